"""Trains vila-u-nano from random weights: `python examples/nano_u/train_u.py`.

First the codes (tower, codebooks, pixel decoder), then with these frozen the language model, the depth transformer and
the projector, on drawing and answering at once. A run that was stopped goes on when the same command is given again.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

import recipe
import torch
from build_u import build, save
from codes_training import CodesTraining, LabelledScenes, normalise, quality
from drawn_scenes import DrawnScenes
from optimizer import MuonAdamW
from running import steps_done, training_arguments
from torch.utils.data import default_collate
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from vila.training_vila_u import VilaUDataCollator

logger = logging.getLogger("nano_u")
OUTPUT = Path(__file__).resolve().parents[2] / "nano-u-run"
FINAL, LOG = "final", "log.jsonl"
NORMALISED = 256  # pictures that the mean of features is taken from
CODES_STEPS, CODES_BATCH, CODES_RATE = 3000, 16, 2e-3
STEPS, BATCH, RATE = 3000, 32, 2e-3
CAPTION_DROPOUT = 0.1


class Log(TrainerCallback):
    """Appends every logged loss to a file, one JSON object per line."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage, self.started = path, stage, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            row = {"stage": self.stage, "step": state.global_step, "loss": logs["loss"]}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "seconds": round(time.monotonic() - self.started, 1)}) + "\n")


def arguments_of(folder: Path, steps: int, batch: int, rate: float, seed: int) -> TrainingArguments:
    return training_arguments(
        folder, steps, per_device_train_batch_size=batch, learning_rate=rate, lr_scheduler_type="cosine", seed=seed
    )


def run(
    trainee: Any,
    folder: Path,
    options: argparse.Namespace,
    training: TrainingArguments,
    rows: Callable[..., Any],
    collator: Any,
) -> None:
    """One stage; goes on from its last checkpoint. `rows` makes the dataset that starts at the row `start`."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer = Trainer(
        trainee,
        training,
        data_collator=collator,
        train_dataset=rows(start=steps_done(last) * training.per_device_train_batch_size),
        optimizers=(MuonAdamW(trainee, training.learning_rate, recipe.WEIGHT_DECAY, recipe.BETA2), None),
        callbacks=[Log(options.output / LOG, folder.name)],
    )
    trainer.train(resume_from_checkpoint=last)


def train_codes(start: Path, folder: Path, options: argparse.Namespace) -> None:
    model, processor = AutoModel.from_pretrained(start, dtype="float32"), AutoProcessor.from_pretrained(start)
    patch = model.config.vision_config.patch_size
    trainee, steps = CodesTraining(model.model), max(1, round(CODES_STEPS * options.steps))
    rows = partial(LabelledScenes, patch, options.seed)
    training = arguments_of(folder, steps, CODES_BATCH, CODES_RATE, options.seed)
    run(trainee, folder, options, training, rows, default_collate)
    some = list(islice(rows(), NORMALISED))
    normalise(model.model.eval(), torch.stack([row["pixel_values"] for row in some]))
    logger.info("Reconstruction: %s", json.dumps(quality(model.model)))
    save(model, processor, folder / FINAL, torch.float32)


def train_language(start: Path, folder: Path, options: argparse.Namespace) -> None:
    model, processor = AutoModel.from_pretrained(start, dtype="float32"), AutoProcessor.from_pretrained(start)
    model.model.vision_tower.requires_grad_(False)  # the codes stay what they are
    collator = VilaUDataCollator(processor, caption_dropout=CAPTION_DROPOUT)
    steps = max(1, round(STEPS * options.steps))
    training = arguments_of(folder, steps, BATCH, RATE, options.seed)
    run(model, folder, options, training, partial(DrawnScenes, seed=options.seed), collator)
    save(model, processor, folder / FINAL, torch.float32)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="train_u.py", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=float, default=1.0, help="times the recipe's steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the arithmetic (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    current = options.output / "untrained"
    if not (current / "config.json").is_file():
        build(current, options.seed)
    for name, stage in (("codes", train_codes), ("language", train_language)):
        folder = options.output / name
        if not (folder / FINAL / "config.json").is_file():
            stage(current, folder, options)
        current = folder / FINAL
    model, final = AutoModel.from_pretrained(current, dtype="float32"), options.output / FINAL
    save(model, AutoProcessor.from_pretrained(current), final, torch.bfloat16)
    sys.stdout.write(f"{final}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"train_u.py: {error}")
