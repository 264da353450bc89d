"""What a user names -> a processor and a model that is ready: original checkpoints are converted on first use.

Only this package's classes are used: code that lies beside the weights is never run.
"""

import hashlib
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from .chat_templates_vila import (
    CONV_MODES,
    choose_vila_u_template,
    named_template,
    stop_token_ids,
    user_end_ids,
)
from .conversion_vila import convert, read_json, resolve_source
from .families_vila import FAMILIES, PS3, family_of
from .lora_vila import merge_lora, read_lora_config
from .modeling_vila import VilaForConditionalGeneration
from .processing_vila import VilaProcessor
from .weight_names_vila import PART_PREFIXES

DTYPES = ("auto", "float32", "float16", "bfloat16")


class Checkpoint:
    """A checkpoint that loads, with the chat template that the user chose.

    Args:
        source: converted or original folder, or the Hub id of one. An original is converted into a cache below
            `$HF_HOME/vila` and found there the next time.
        conv_mode: chat template, one of `CONV_MODES`; `"auto"` is the checkpoint's own.

    Raises:
        ValueError, FileNotFoundError: if it is no VILA checkpoint or not complete, or the mode is unknown.
    """

    def __init__(self, source: str | Path, conv_mode: str = "auto"):
        if conv_mode not in CONV_MODES:
            raise ValueError(f"unknown conv mode {conv_mode!r}; known are {', '.join(CONV_MODES)}")
        folder = resolve_source(source)
        root = read_json(folder / "config.json")
        is_converted = "text_config" in root
        if FAMILIES.get(str(root.get("model_type"))) is PS3:
            raise ValueError(f"{source} holds an encoder without a language model, which answers no questions")
        if is_converted and root.get("model_type") not in FAMILIES:
            raise ValueError(f"{source} holds a model of the type {root.get('model_type')!r}, no VILA checkpoint")
        if is_converted and conv_mode != "auto" and root["model_type"] == "vila_u":
            choose_vila_u_template(conv_mode)
            conv_mode = "auto"  # it has no other one
        self.folder = folder if is_converted else convert_cached(folder, checkpoint_name(source), conv_mode)
        # a conversion has the template already, and may have taken the checkpoint's own of that name
        self.family = family_of(read_json(self.folder / "config.json"))
        self.template = named_template(conv_mode) if is_converted and conv_mode != "auto" else None

    def load_processor(self) -> VilaProcessor:
        processor: Any = self.family.processor_class.from_pretrained(self.folder, trust_remote_code=False)
        if self.template is not None:
            processor.chat_template = self.template
        return processor

    def load_model(
        self,
        processor: VilaProcessor,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        lora: str | Path | None = None,
    ) -> VilaForConditionalGeneration:
        """The model in evaluation mode, whose answers end where the processor's chat template ends them.

        Args:
            device: by default `default_device()`.
            dtype: one of `DTYPES`; `"auto"` is the checkpoint's.
            lora: an adapter's folder, see `merge_lora`.

        Raises:
            ValueError: if the device is not there, or the adapter does not fit.
        """
        device = check_device(device or default_device())
        if lora is not None:
            read_lora_config(lora)  # what is wrong with it is told before the weights are read
        model: Any = self.family.model_class.from_pretrained(self.folder, dtype=dtype)
        if lora is not None:
            model = merge_lora(model, lora)
        if self.template is not None:
            model.generation_config.eos_token_id = stop_token_ids(self.template, processor.tokenizer)
            if hasattr(model.config, "user_end_ids"):
                model.config.user_end_ids = user_end_ids(self.template, processor.tokenizer)
        return model.to(device).eval()


def checkpoint_name(source: str | Path) -> str:
    return Path(source).resolve().name if Path(source).is_dir() else str(source).rsplit("/", 1)[-1]


def convert_cached(source: Path, name: str, conv_mode: str = "auto") -> Path:
    """The converted form of an original folder, from the cache or made now.

    It is built in a temporary folder beside its place and moved there as a whole, so that an interruption leaves
    nothing that looks complete. The folder holds links to the original weights.
    """
    cache = Path(HF_HOME) / "vila"
    target = cache / f"{name}-{fingerprint(source, conv_mode)}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as staging:
        converted = convert(source, Path(staging) / "converted", conv_mode=conv_mode)
        try:
            os.replace(converted, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def fingerprint(source: Path, conv_mode: str) -> str:
    """A short hash of what a conversion depends on: the files with sizes and times, the template, the package."""
    try:
        package = version("vila-hf")
    except PackageNotFoundError:
        package = ""
    source = source.resolve()
    files = sorted(
        path for folder in (source, *(source / part for part in PART_PREFIXES)) for path in folder.glob("*")
    )
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return hashlib.sha256(repr((str(source), stats, conv_mode, package)).encode()).hexdigest()[:12]


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str | torch.device) -> torch.device:
    """The device.

    Raises:
        ValueError: if it is not there.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device {str(name)!r} cannot be used here") from error
    return device


__all__ = ["DTYPES", "Checkpoint", "convert_cached", "default_device"]
