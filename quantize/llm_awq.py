"""Reads int4 language models that llm-awq published (`*-v2.pt`, as TinyChat runs them).

Four rows share an int16 per column, columns are in the order of its CUDA kernels, and instead of zeros there are
`scaled_zeros`, minus zero times scale; scales are padded to whole blocks of groups.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..int4_linear_vila import Int4Linear, pack_int4

ROWS, BLOCK, TILE = 4, 64, 32
PARTS = ("qweight", "scales", "scaled_zeros")


def column_order() -> torch.Tensor:
    """Original columns in the order in which a tile of 32 stores them."""
    return torch.arange(TILE).view(4, 4, 2).transpose(0, 1).transpose(1, 2).flatten()


def unpack_v2(packed: torch.Tensor) -> torch.Tensor:
    """`(rows / 4, columns)` int16 -> `(rows, columns)` uint8 of 0 to 15."""
    quads, columns = packed.shape
    nibbles = (packed.to(torch.int32).unsqueeze(-1) >> torch.arange(0, 16, 4)) & 15
    stored = nibbles.view(quads, columns // BLOCK, ROWS, BLOCK).transpose(1, 2).reshape(quads * ROWS, -1, TILE)
    values = torch.empty_like(stored)
    values[..., column_order()] = stored
    return values.flatten(1).to(torch.uint8)


def to_gemm(tensors: dict[str, torch.Tensor], group_size: int, name: str) -> Int4Linear:
    """A layer from its `PARTS` and, where it has one, its `bias`.

    Raises:
        ValueError: naming the layer, if groups of that size do not fit its scales.
    """
    values, scales, scaled_zeros = unpack_v2(tensors["qweight"]), tensors["scales"], tensors["scaled_zeros"]
    outputs, inputs = values.shape
    groups = inputs // group_size
    if inputs % group_size or len(scales) < groups or scales.shape[1] != outputs:
        raise ValueError(f"{name} of {outputs} x {inputs} has scales {list(scales.shape)}, not groups of {group_size}")
    layer = Int4Linear(inputs, outputs, group_size, "bias" in tensors)
    layer.scales = scales[:groups].half().contiguous()
    zeros = (-scaled_zeros[:groups].float() / layer.scales.float()).nan_to_num_().round_().clamp_(0, 15)
    layer.qweight, layer.qzeros = pack_int4(values.t()), pack_int4(zeros)
    if "bias" in tensors:
        layer.bias = tensors["bias"].clone()
    return layer


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """
    Raises:
        FileNotFoundError, ValueError: if it is not there, or holds more than tensors: other objects are never built.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    try:
        return torch.load(file, "cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged, or holds more than tensors") from error


@torch.no_grad()
def load_llm_awq(model: Any, file: Path, group_size: int) -> None:
    """Puts a published language model in the place of a VILA model's.

    Args:
        model: of the same shapes; its tower and projector stay.

    Raises:
        FileNotFoundError, ValueError: naming the tensor that is missing or does not fit; the model is of no use then.
    """
    stored = {name.removeprefix("llm."): tensor for name, tensor in read_pickle(file).items()}
    language_model, weights = model.model.language_model, dict[str, torch.Tensor]()
    quantized = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    if not quantized or f"{quantized[0]}.scaled_zeros" not in stored:
        raise ValueError(f"{file} holds no int4 layers in the v2 layout of llm-awq")
    for name in quantized:
        parts = {part: stored.pop(f"{name}.{part}") for part in (*PARTS, "bias") if f"{name}.{part}" in stored}
        own = name.removeprefix("model.")
        old: Any = dict(language_model.named_modules()).get(own)
        layer = to_gemm(parts, group_size, name)
        if old is None or (old.in_features, old.out_features) != (layer.in_features, layer.out_features):
            raise ValueError(f"{file} holds {name} of {layer.out_features} x {layer.in_features}, the model does not")
        language_model.set_submodule(own, layer.to(old.weight.dtype))
    for name, tensor in stored.items():
        if name.startswith("lm_head."):
            model.lm_head.weight.copy_(tensor)
        elif "rotary_emb" not in name:
            weights[name.removeprefix("model.")] = tensor
    packed = {name for name, _ in language_model.named_buffers()}
    expected = {name for name in language_model.state_dict() if name not in packed}
    if missing := sorted(expected - weights.keys()):
        raise ValueError(f"{file} lacks {len(missing)} tensor(s) of the language model, among them {missing[0]!r}")
    language_model.load_state_dict({name: weights[name] for name in expected}, strict=False)
