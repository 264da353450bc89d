"""Loading weights: all that the model needs or an error, and from safetensors only."""

import inspect
import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from .quantization_vila import own_quantization, register_quantization

register_quantization()

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
PICKLES = ("*.bin", "*.pt", "*.pth")

# whether the caller of `from_pretrained` accepts weights of another shape
accepts_mismatch: ContextVar[bool] = ContextVar("accepts_mismatch", default=False)


class VilaCompleteLoading(PreTrainedModel):
    """`from_pretrained` without its way to make up weights that the checkpoint lacks."""

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *args: Any,
        config: Any = None,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers. Weights that the model has no place for are reported, and left out.

        Raises:
            ValueError: naming a weight that is missing (unless the class lists it in
                `_keys_to_ignore_on_load_missing`) or, unless `ignore_mismatched_sizes`, of another shape; if a file is
                damaged, or there are only pickle files, which are never read.
        """
        if use_safetensors is False:
            raise ValueError("weights are read from safetensors files only: a pickle file can run any code")
        if source is not None and config is None:
            config = cls._quantized_config(source, kwargs)
        if isinstance(config, PreTrainedConfig):
            config = own_quantization(config)
        token = accepts_mismatch.set(ignore_mismatched_sizes)
        options = {"config": config, "use_safetensors": True, **kwargs}
        try:
            # otherwise transformers' own error replaces the one that names the weight
            return super().from_pretrained(source, *args, ignore_mismatched_sizes=True, **options)
        except SafetensorError as error:
            raise ValueError("a weight file of the checkpoint is damaged: no readable safetensors file") from error
        except OSError as error:
            if source is not None and holds_only_pickles(Path(source) / kwargs.get("subfolder", "")):
                raise ValueError(
                    "the checkpoint holds pickle files only, which are never read: save the weights as safetensors"
                ) from error
            raise
        finally:
            accepts_mismatch.reset(token)

    @classmethod
    def _quantized_config(cls, source: Any, options: dict[str, Any]) -> PreTrainedConfig | None:
        """The config of an int4 checkpoint, with its own options taken out of the others; None for any other."""
        hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
        config_class: Any = cls.config_class
        found, _ = config_class.get_config_dict(source, **hub_options)
        if "quantization_config" not in found:
            return None
        # those of every VILA config, not what all models of transformers have
        bases = [base for base in config_class.__mro__ if not issubclass(PreTrainedConfig, base)]
        names = {name for base in bases for name in inspect.get_annotations(base)}
        own = {name: options.pop(name) for name in [*options] if name in names}
        return config_class.from_pretrained(source, **hub_options, **own)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """A base model is loaded from the folder of the whole: the head is no stranger there.

        It is not among `_keys_to_ignore_on_load_unexpected`: by those engines, which have a head of their own, drop
        weights.
        """
        if not hasattr(self, "lm_head"):
            loading_info.unexpected_keys = {
                name for name in loading_info.unexpected_keys if not name.startswith("lm_head.")
            }
        super()._adjust_missing_and_unexpected_keys(loading_info)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """The step before transformers makes up weights: of a config of huge numbers, it would not even return."""
        super().mark_tied_weights_as_initialized(loading_info)
        ignored = re.compile("|".join(self._keys_to_ignore_on_load_missing or ["(?!)"]))
        missing = sorted(
            name
            for name in loading_info.missing_keys
            if name not in self.all_tied_weights_keys and not ignored.search(name)
        )
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} weight(s) of the model, among them {missing[0]!r}")
        if loading_info.mismatched_keys and not accepts_mismatch.get():
            name, found, expected = sorted(loading_info.mismatched_keys)[0]
            raise ValueError(f"the weight {name!r} has the shape {list(found)}, its config says {list(expected)}")


def holds_only_pickles(folder: Path) -> bool:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return False
    return any(any(folder.glob(pattern)) for pattern in PICKLES)
