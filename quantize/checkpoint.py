"""A VILA checkpoint -> the same with int4 weights in its language model."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..families_vila import FAMILIES
from ..loading_vila import Checkpoint, check_device
from ..quantization_vila import round_head
from .calibration import Source, calibration_chats, name_of
from .gptq import import_quantizer
from .layers import check_layers, collect_samples, quantize_layers
from .llm_awq import load_llm_awq
from .options import Options

PARTIAL, PLAN, REPORT = ".layers", "plan.json", "quantization_report.json"


def quantize(
    source: str | Path,
    target: str | Path,
    options: Options | None = None,
    calibration: Source = None,
    device: str | None = None,
) -> Path:
    """Writes an int4 checkpoint that `AutoModel.from_pretrained` loads.

    Layers are done one after the other, and what is done is kept in the target: a run that was stopped goes on there.

    Args:
        source: folder or Hub id of a converted or original VILA checkpoint.
        target: folder that is new, empty, or left by a run with the same options that was stopped.
        calibration: see `calibration_chats`.
        device: that searches; the CPU by default.

    Raises:
        ValueError: if group sizes do not divide the layers, the model is quantised already, or a layer is of no form
            that the search knows; nothing is written then.
        ModuleNotFoundError: if GPTQ's packages are missing.
        FileExistsError: if the target holds anything else.
    """
    options, target = options or Options(), Path(target)
    found_device = check_device(device or "cpu")
    model, processor = load_whole(source)
    check_layers(model, options)
    chats = []
    if options.method == "gptq":
        import_quantizer()
    if options.method != "rtn":
        chats = calibration_chats(calibration, options.samples, options.media_share, options.seed)
    partial = prepare_target(target, options, str(source), name_of(calibration))
    samples = collect_samples(model, processor, chats, options.max_tokens)
    losses = quantize_layers(model, samples, options, partial, found_device)
    write(model, processor, options, target, {"source": Path(source).name, **asdict(options), "losses": losses})
    shutil.rmtree(partial)
    return target


def from_llm_awq(source: str | Path, weights: str | Path, target: str | Path, options: Options | None = None) -> Path:
    """Turns a language model that llm-awq published into a checkpoint that `AutoModel.from_pretrained` loads.

    Args:
        source: the VILA checkpoint that was quantised; what the file does not hold is taken from it.
        weights: `*-v2.pt`.
        target: folder that is new or empty.
        options: group size and head bits, and the format of the rest.

    Raises:
        ValueError, FileNotFoundError: see `load_llm_awq`; nothing is written then.
        FileExistsError: if the target is not empty.
    """
    options, target = options or Options(), Path(target)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty")
    model, processor = load_whole(source)
    load_llm_awq(model, Path(weights), options.group_size)
    target.mkdir(parents=True, exist_ok=True)
    write(model, processor, options, target, {"source": Path(source).name, "llm_awq": Path(weights).name})
    return target


def load_whole(source: str | Path) -> tuple[Any, Any]:
    """Model and processor of a checkpoint that is not quantised yet."""
    checkpoint = Checkpoint(source)
    processor = checkpoint.load_processor()
    model: Any = checkpoint.load_model(processor, device="cpu")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantised already")
    return model, processor


def write(model: Any, processor: Any, options: Options, target: Path, report: dict[str, Any]) -> None:
    """Writes everything that belongs to a checkpoint; the files appear in the target when all are complete."""
    model.to(getattr(torch, options.dtype))
    if options.head_bits == 8:
        round_head(model)
    model.config.quantization_config = options.config()
    with tempfile.TemporaryDirectory(dir=target) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        FAMILIES[model.config.model_type].copy_code(Path(staging))
        (Path(staging) / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for file in Path(staging).iterdir():
            os.replace(file, target / file.name)


def prepare_target(target: Path, options: Options, source: str, calibration: str) -> Path:
    """The folder of finished layers in the target."""
    partial, plan = target / PARTIAL, json.dumps({"source": source, "calibration": calibration, **asdict(options)})
    if target.exists() and any(target.iterdir()) and not (partial / PLAN).is_file():
        raise FileExistsError(f"{target} exists and is not empty")
    if partial.is_dir() and (partial / PLAN).read_text(encoding="utf-8") != plan:
        raise FileExistsError(f"{target} holds a run with other options that was stopped: remove it, or use those")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / PLAN).write_text(plan, encoding="utf-8")
    return partial
