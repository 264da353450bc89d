"""LoRA adapters, of this package and of the original training code, merged into a model.

The original's folders spell modules by its own tree (`llm.model.layers...`) and may hold `non_lora_trainables.bin`:
the whole weights of parts that were trained beside the adapters, such as the projector.
"""

import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .weight_names_vila import with_module_names

Model = TypeVar("Model", bound=PreTrainedModel)

PEFT_PREFIX = "base_model.model."
WHOLE_WEIGHTS = "non_lora_trainables.bin"


def merge_lora(model: Model, folder: str | Path) -> Model:
    """Adds an adapter to the weights; the model has the same modules as before.

    Args:
        folder: `adapter_config.json` and `adapter_model.safetensors` or `.bin`.

    Raises:
        FileNotFoundError: if the folder holds no adapter.
        ValueError: if peft is missing, it is no LoRA, or a tensor fits no module; the message names the tensor.
    """
    config = read_lora_config(folder)
    from peft import PeftModel

    weights = read_weights(Path(folder))
    adapters = {name: weights.pop(name) for name in [*weights] if ".lora_" in name}
    modules = {name: re.split(r"\.lora_", name)[0] for name in adapters}
    known = dict(model.named_modules())
    for name, module in modules.items():
        if module not in known:
            raise ValueError(f"the adapter's tensor {name!r} belongs to no module of the model")
    load_tensors(model, weights)
    if not adapters:
        return model
    # exactly the modules that have tensors: a short name like "q_proj" would also match the tower's
    config.target_modules, config.exclude_modules = sorted(set(modules.values())), None
    config.rank_pattern, config.alpha_pattern = map(with_module_names, (config.rank_pattern, config.alpha_pattern))
    config.layers_to_transform, config.layers_pattern = None, None
    config.modules_to_save, config.bias, config.inference_mode = None, "none", True
    adapted: Any = PeftModel(model, config)
    named = {re.sub(r"(\.lora_[^.]+)", r"\1.default", PEFT_PREFIX + name): adapters[name] for name in adapters}
    load_tensors(adapted, named, complete=lambda name: ".lora_" in name)
    return adapted.merge_and_unload()


def read_lora_config(folder: str | Path) -> Any:
    """An adapter's `peft.LoraConfig`.

    Raises:
        FileNotFoundError, ValueError: as `merge_lora`.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError("an adapter needs peft: pip install 'vila-hf[train]'") from error
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: adapter_config.json is missing")
    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA":
        raise ValueError(f"{folder} holds an adapter of the type {config.peft_type}, not LORA")
    return config


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an adapter's folder under the names of the model's own modules.

    Raises:
        FileNotFoundError: if there is no weight file.
        ValueError: if one cannot be read, or a name cannot be translated.
    """
    files = [folder / "adapter_model.safetensors", folder / "adapter_model.bin", folder / WHOLE_WEIGHTS]
    weights: dict[str, torch.Tensor] = {}
    if not (files[0].is_file() or files[1].is_file()):
        raise FileNotFoundError(f"{folder} holds no adapter_model.safetensors")
    for file in files:
        if not file.is_file() or (file == files[1] and weights):
            continue
        try:
            stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is broken, or holds more than tensors") from error
        if not isinstance(stored, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in stored.values()):
            raise ValueError(f"{file} holds more than tensors by name")
        weights |= {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.items()}
    for name in weights:
        # the fused projection of InternViT is split here, which an adapter's two factors do not allow one by one
        if ".qkv." in name and ".lora_" in name:
            raise ValueError(f"the adapter's tensor {name!r} cannot be translated to the modules of this package")
    return with_module_names(weights)


def load_tensors(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], complete: Callable[[str], bool] = lambda name: False
) -> None:
    """Copies tensors into the parameters of their names, in these parameters' dtype.

    Args:
        complete: which parameters must be among them.

    Raises:
        ValueError: naming the first tensor that is missing, too many or of another shape.
    """
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise ValueError(f"the adapter's tensor {name!r} belongs to no module of the model")
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, the model's {list(own[name].shape)}"
            raise ValueError(f"the adapter's tensor {name!r} has the shape {shapes}")
    for name in own:
        if complete(name) and name not in tensors:
            raise ValueError(f"the adapter lacks the tensor {name!r}")
    model.load_state_dict(tensors, strict=False)


__all__ = ["merge_lora", "read_lora_config"]
