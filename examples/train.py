"""Fine-tunes a checkpoint on chats: `python examples/train.py --model DIR --data rows.jsonl --output OUT`.

Every line of the data is `{"messages": [...]}`; relative paths of media are meant from its folder. A VILA-HD also
learns where to look from `"boxes"`, see `VilaHDDataCollator`.
All options of `transformers.TrainingArguments` work; a run that was stopped goes on from its last checkpoint.
Several processes: `torchrun --nproc-per-node 8 examples/train.py ...` (or `accelerate launch`).
"""

import argparse
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from vila.training_presets_vila import LORA, PRESETS, TrainingPreset, split_batch
from vila.training_vila import LORA_TARGETS, PARTS, VilaDataCollator, parts_of, set_vision_resolution, train_only
from vila.training_vila_hd import VilaHDDataCollator
from vila.training_vila_u import VilaUDataCollator

logger = logging.getLogger(__name__)
MEDIA_PATH_KEYS = ("image", "video", "path")
ROW_KEYS = ("messages", "boxes")
COLLATORS: dict[str, Any] = {"vila_u": VilaUDataCollator, "vila_hd": VilaHDDataCollator}


@dataclass
class Options:
    model: str = field(metadata={"help": "converted checkpoint: folder or Hub id"})
    data: str = field(metadata={"help": "jsonl file of chats"})
    output: str = field(metadata={"help": "folder for checkpoints and the result"})
    preset: str | None = field(default=None, metadata={"help": "stage of a release", "choices": sorted(PRESETS)})
    eval_data: str | None = field(default=None, metadata={"help": "jsonl file that is only evaluated"})
    tuned: list[str] | None = field(
        default=None, metadata={"help": "parts to train (default: the preset's, else all)", "choices": sorted(PARTS)}
    )
    global_batch_size: int | None = field(default=None, metadata={"help": "rows per step over all processes"})
    max_length: int | None = field(default=None, metadata={"help": "ids per row; longer rows are cut"})
    dtype: str = field(default="float32", metadata={"help": "of the weights; --bf16 computes in another"})
    packing: bool = field(default=False, metadata={"help": "all rows of a device batch in one, without padding"})
    vision_resolution: int | None = field(default=None, metadata={"help": "side of a tile in pixels, if another"})
    token_selection_loss_weight: float | None = field(
        default=None, metadata={"help": "VILA-HD: weight of the loss of where to look (default: the checkpoint's)"}
    )
    caption_dropout: float = field(
        default=0.0, metadata={"help": "VILA-U: share of the rows that only draw whose request is left out"}
    )
    lora: bool = field(default=False, metadata={"help": "train adapters of the language model instead of its weights"})
    lora_r: int = field(default=LORA["r"], metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=LORA["lora_alpha"], metadata={"help": "their scale, times the rank"})
    lora_dropout: float = field(default=LORA["lora_dropout"], metadata={"help": "dropout in front of them"})


def parse(arguments: list[str]) -> tuple[Options, TrainingArguments]:
    """Command line -> options; what the preset says is a default that the command line overrides."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--preset", choices=sorted(PRESETS))
    given.add_argument("--output")
    for name in ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"):
        given.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    first, _ = given.parse_known_args(arguments)
    preset = PRESETS.get(first.preset)

    parser = HfArgumentParser((Options, TrainingArguments), allow_abbrev=False)
    parser.set_defaults(
        output_dir=first.output,
        remove_unused_columns=False,
        logging_steps=10,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    )
    if preset is not None:
        parser.set_defaults(max_length=preset.max_length, tuned=list(preset.tuned), **preset.arguments())
    parser.set_defaults(**batch_sizes(preset, first))
    options, training = parser.parse_args_into_dataclasses(arguments)
    return options, training


def batch_sizes(preset: TrainingPreset | None, given: argparse.Namespace) -> dict[str, int]:
    """The two sizes that `TrainingArguments` takes, where the command line leaves them open."""
    device, passes = given.per_device_train_batch_size, given.gradient_accumulation_steps
    total = given.global_batch_size
    if total is None and preset is not None and (device is None or passes is None):
        total = preset.global_batch_size
        if total is None:
            device, passes = device or preset.device_batch_size, passes or preset.accumulation
    if total is not None:
        device, passes = split_batch(total, int(os.environ.get("WORLD_SIZE", 1)), device, passes)
    sizes = {"per_device_train_batch_size": device, "gradient_accumulation_steps": passes}
    return {name: size for name, size in sizes.items() if size is not None}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file, with the paths of its media made absolute.

    Raises:
        ValueError: for a line that is no JSON object with `messages`, or a file without any.
    """
    rows, folder = [], Path(path).resolve().parent
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages = row["messages"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: this is no JSON object with 'messages'") from error
        for block in [
            block for message in messages for block in message.get("content") or () if isinstance(block, dict)
        ]:
            for key in MEDIA_PATH_KEYS:
                if isinstance(block.get(key), str) and (folder / block[key]).exists():
                    block[key] = str(folder / block[key])
        rows.append({key: row[key] for key in ROW_KEYS if key in row})
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def check_recipe(preset: TrainingPreset, config: Any, processor: Any) -> None:
    """Says where the checkpoint is not what the release trained in this stage."""
    for name, expected in preset.expected:
        actual = getattr(processor.image_processor if name == "image_mode" else config, name)
        if actual != expected:
            logger.warning("The released model of this stage has %s=%r, this one %r.", name, expected, actual)


def weigh_boxes(config: Any, weight: float | None, rows: list[dict[str, Any]]) -> None:
    """Puts the weight of the loss of where to look into the config.

    Raises:
        ValueError: if it makes no sense, or rows have boxes that would teach nothing.
    """
    has_boxes = any(row.get("boxes") is not None for row in rows)
    if config.model_type != "vila_hd":
        if has_boxes or weight is not None:
            raise ValueError("boxes and token_selection_loss_weight are for a VILA-HD, which chooses where to look")
        return
    if weight is not None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"token_selection_loss_weight must be 0 or more, got {weight}")
        config.token_selection_loss_weight = weight
    if has_boxes and not config.token_selection_loss_weight:
        raise ValueError("rows have boxes, which teach nothing with a --token_selection_loss_weight of 0")


def extend_context(config: Any, max_length: int | None) -> None:
    """Linear RoPE scaling where rows are longer than the language model was made for, as the original does."""
    limit = config.max_position_embeddings
    if max_length is not None and max_length > limit:
        factor = float(math.ceil(max_length / limit))
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
        logger.warning("max_length %d is above the model's %d: positions are scaled by %g.", max_length, limit, factor)


def add_adapters(model: Any, options: Options) -> Any:
    """The model with LoRA adapters in the language model; other tuned parts are trained and saved as a whole."""
    from peft import LoraConfig, get_peft_model

    whole = [PARTS[part][0].rsplit(".", 1)[-1] for part in options.tuned or () if part != "language_model"]
    return get_peft_model(
        model,
        LoraConfig(
            r=options.lora_r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            bias=LORA["bias"],
            target_modules=LORA_TARGETS,
            modules_to_save=whole or None,
        ),
    )


def collator_for(model_type: str, processor: Any, options: Options) -> VilaDataCollator:
    """Raises: ValueError: for an option of another family's."""
    own = {"packing": options.packing, "max_length": options.max_length}
    if options.caption_dropout:
        if model_type != "vila_u":
            raise ValueError("--caption_dropout leaves out requests for pictures: it is for VILA-U only")
        own["caption_dropout"] = options.caption_dropout
    return COLLATORS.get(model_type, VilaDataCollator)(processor, **own)


def main(arguments: list[str]) -> None:
    options, training = parse(arguments)
    set_seed(training.seed)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True)
    if options.preset is not None:
        check_recipe(PRESETS[options.preset], config, processor)
    extend_context(config.text_config, options.max_length)
    rows = read_rows(options.data)
    eval_rows = read_rows(options.eval_data) if options.eval_data else None
    weigh_boxes(config, options.token_selection_loss_weight, [*rows, *(eval_rows or ())])
    model = AutoModel.from_pretrained(options.model, config=config, trust_remote_code=True, dtype=options.dtype)
    if options.vision_resolution is not None:
        set_vision_resolution(model, processor, options.vision_resolution)
    model = add_adapters(model, options) if options.lora else train_only(model, options.tuned or parts_of(model))

    trainer = Trainer(
        model,
        training,
        data_collator=collator_for(config.model_type, processor, options),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
    )
    last = get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or last)
    trainer.save_model()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
