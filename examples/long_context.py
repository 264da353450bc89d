"""LongVILA's recipe: a longer context by a larger rope base, then long videos.

1. `--preset longvila/extend-256k --data texts.jsonl`: adapters of the language model on long texts under the new rope
   base, merged at the end (LongVILA, stage 4). The next larger context starts from the result.
2. `--preset longvila/sft-512 --data videos.jsonl --sequence_parallel 14`: everything on long videos (stage 5).

`python examples/long_context.py --preset PRESET --model DIR --output OUT ...`; the model lies in `OUT/final`. Rows are
those of `train.py`. `nano/short`, `nano/extend` and `nano/long` do the same with vila-nano, on rows that are drawn.
All options of `transformers.TrainingArguments` work; a run that was stopped goes on from its last checkpoint.
"""

import argparse
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from haystack import LongTexts, Needles
from train import read_rows
from transformers import AutoConfig, AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from vila.context_vila import check_rope
from vila.families_vila import VILA
from vila.sequence_parallel_vila import SequenceParallel
from vila.sequence_training_vila import SequenceParallelTrainer
from vila.training_presets_vila import LORA
from vila.training_vila import LORA_TARGETS, VilaDataCollator, parts_of, train_only

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage; sources: the release's scripts.

    Attributes:
        max_length: ids per row, and the context of the result.
        rope_theta: base of the rotary embedding; None leaves it.
        steps: of the optimiser; None for one epoch.
        num_frames, fps: of every video; None where there is none.
        sequence_parallel: processes that share a row.
        adapters: whether adapters of the language model are trained and merged, or everything.
        drawn: rows of `haystack.py` where no data is given.
        tower: whether the vision tower is trained with all else; vila-nano's was trained by itself.
    """

    max_length: int
    learning_rate: float
    rope_theta: float | None = None
    steps: int | None = None
    num_frames: int | None = None
    fps: float = 2.0
    sequence_parallel: int = 1
    adapters: bool = False
    schedule: str = "constant_with_warmup"
    drawn: int = 0
    tower: bool = True


STAGES = {
    "longvila/extend-64k": Stage(131_072, 2e-5, 15_300_000, 40, adapters=True),
    "longvila/extend-256k": Stage(262_144, 2e-5, 207_112_184, 80, adapters=True),
    "longvila/extend-512k": Stage(524_288, 2e-5, 1_062_356_830, 80, adapters=True),
    "longvila/extend-1m": Stage(1_048_576, 2e-5, 3_580_165_449, 50, adapters=True),
    "longvila/sft-256": Stage(131_072, 2e-5, num_frames=256, sequence_parallel=14, schedule="cosine"),
    "longvila/sft-512": Stage(262_144, 5e-5, num_frames=512, sequence_parallel=14, schedule="cosine"),
    "longvila/sft-1024": Stage(262_144, 5e-5, num_frames=1024, sequence_parallel=28, schedule="cosine"),
    "longvila/sft-2048": Stage(524_288, 5e-5, num_frames=2048, sequence_parallel=28, schedule="cosine"),
    # the same in small: what fits into vila-nano's own context, then six times as much
    "nano/short": Stage(2_048, 3e-4, num_frames=256, fps=0, schedule="cosine", drawn=1_200, tower=False),
    "nano/extend": Stage(12_288, 1e-3, 250_000, 6, adapters=True, drawn=48),
    "nano/long": Stage(12_288, 3e-4, num_frames=2048, fps=0, schedule="cosine", drawn=200, tower=False),
}
NANO_BATCH = 8  # rows per step of the drawn stages


@dataclass
class Options:
    preset: str = field(metadata={"help": "stage", "choices": list(STAGES)})
    model: str = field(metadata={"help": "converted checkpoint, or the result of the stage before: folder or Hub id"})
    output: str = field(metadata={"help": "folder for checkpoints and the result"})
    data: str | None = field(default=None, metadata={"help": "jsonl file of chats; none draws the rows"})
    rows: int | None = field(default=None, metadata={"help": "how many rows are drawn (default: the preset's)"})
    num_frames: int | None = field(
        default=None, metadata={"help": "frames of a video at most (default: the preset's)"}
    )
    sequence_parallel: int | None = field(default=None, metadata={"help": "processes that share a row"})
    dtype: str = field(default="float32", metadata={"help": "of the weights; --bf16 computes in another"})


def parse(arguments: list[str]) -> tuple[Options, TrainingArguments]:
    """Command line -> options; what the preset says is a default that the command line overrides."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--preset", choices=list(STAGES))
    given.add_argument("--output")
    known, _ = given.parse_known_args(arguments)
    parser = HfArgumentParser((Options, TrainingArguments), allow_abbrev=False)
    parser.set_defaults(
        output_dir=known.output,
        remove_unused_columns=False,
        report_to="none",
        per_device_train_batch_size=1,
        activation_checkpointing=torch.accelerator.is_available(),
        bf16=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=1,
        save_total_limit=2,
        warmup_steps=0.03,  # below 1 it is a share of all steps
    )
    if known.preset is not None:
        stage = STAGES[known.preset]
        parser.set_defaults(learning_rate=stage.learning_rate, lr_scheduler_type=stage.schedule, num_train_epochs=1)
        parser.set_defaults(max_steps=stage.steps or -1)
        if stage.drawn:
            parser.set_defaults(gradient_accumulation_steps=NANO_BATCH, save_steps=10)
    options, training = parser.parse_args_into_dataclasses(arguments)
    return options, training


def check_options(stage: Stage, options: Options) -> None:
    """Refuses numbers that are none, and options that this stage, or rows that are given, leave without effect."""
    for name in ("rows", "num_frames", "sequence_parallel"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1 is needed")
    if options.rows is not None and options.data is not None:
        raise ValueError("--rows says how many rows are drawn, but --data gives them")
    if options.num_frames is not None and stage.num_frames is None:
        raise ValueError(f"--num_frames {options.num_frames}: {options.preset} has no videos")


def set_context(config: Any, stage: Stage) -> None:
    """The context and rope base of a stage.

    Raises:
        ValueError: if the context would get shorter, longer with the old base, or the base smaller; if a rotary
            embedding is stretched otherwise already, or would contradict the context.
    """
    text, rope = config.text_config, dict(config.text_config.rope_parameters)
    before, base = text.max_position_embeddings, rope["rope_theta"]
    if stage.max_length < before:
        raise ValueError(f"this stage has a context of {stage.max_length}, the model one of {before} already")
    if stage.rope_theta is None and stage.max_length > before:
        raise ValueError(
            f"this stage has rows of {stage.max_length} ids, the model a context of {before}: extend it first "
            f"({', '.join(name for name, other in STAGES.items() if other.max_length == stage.max_length)})"
        )
    if stage.rope_theta is not None:
        if stage.rope_theta < base:
            raise ValueError(f"this stage has a rope base of {stage.rope_theta:g}, the model one of {base:g} already")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"the stage raises the rope base, the model's rope_parameters stretch by {rope['rope_type']!r} already"
            )
        rope["rope_theta"] = float(stage.rope_theta)
    text.rope_parameters, text.max_position_embeddings = rope, stage.max_length
    check_rope(text)


def rows_of(stage: Stage, options: Options, seed: int) -> Any:
    if options.data is not None:
        return read_rows(options.data)
    if not stage.drawn:
        raise ValueError(f"{options.preset} needs --data")
    count = stage.drawn if options.rows is None else options.rows
    if stage.num_frames is None:
        # what the tokens are estimated from leaves some room
        return LongTexts(count, int(0.8 * stage.max_length), seed)
    return Needles(count, options.num_frames or stage.num_frames, seed)


def trained_parts(model: Any, stage: Stage) -> Any:
    """The model, or with adapters around it."""
    if not stage.adapters:
        return train_only(model, [part for part in parts_of(model) if stage.tower or part != "vision_tower"])
    from peft import LoraConfig, get_peft_model

    settings = {name: value for name, value in LORA.items() if name != "lora_dropout"}
    return get_peft_model(model, LoraConfig(target_modules=LORA_TARGETS, **settings))


def make_trainer(
    model: Any, training: TrainingArguments, stage: Stage, options: Options, processor: Any, rows: Any
) -> Trainer:
    """`SequenceParallelTrainer` where several processes share a row, else `Trainer`."""
    collator = VilaDataCollator(processor, packing=True, max_length=stage.max_length)
    settings = {"train_dataset": rows, "processing_class": processor}
    size = options.sequence_parallel or stage.sequence_parallel
    if size == 1:
        return Trainer(trained_parts(model, stage), training, data_collator=collator, **settings)
    if training.world_size == 1:
        raise ValueError(f"{size} processes share a row, but there is one: torchrun, or --sequence_parallel 1")
    parallel = SequenceParallel(model, size, timeout=training.ddp_timeout)
    return SequenceParallelTrainer(
        trained_parts(model, stage), training, sequence_parallel=parallel, data_collator=collator, **settings
    )


def main(arguments: list[str]) -> None:
    options, training = parse(arguments)
    set_seed(training.seed)
    stage, final = STAGES[options.preset], Path(options.output) / "final"
    check_options(stage, options)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True)
    set_context(config, stage)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    processor.tokenizer.model_max_length = stage.max_length
    if stage.num_frames is not None:
        processor.num_video_frames, processor.video_fps = options.num_frames or stage.num_frames, float(stage.fps)
    rows = rows_of(stage, options, training.seed)
    model = AutoModel.from_pretrained(options.model, config=config, trust_remote_code=True, dtype=options.dtype)
    trainer = make_trainer(model, training, stage, options, processor, rows)
    if stage.adapters and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(f"{options.preset} trains adapters and merges them, which takes whole weights: without FSDP")
    last = get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or last)
    save(trainer, processor, stage, final)


def save(trainer: Trainer, processor: Any, stage: Stage, folder: Path) -> None:
    """The whole model with its code, adapters merged; all processes call it, for they may hold a part each."""
    if not stage.adapters:
        trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        if stage.adapters:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)
        VILA.copy_code(folder)
        sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"long_context.py: {error}")
