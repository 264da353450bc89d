"""Trains vila-nano from random weights: `python examples/nano/train.py`.

A run that was stopped goes on where it was when the same command is given again. Everything is written to `--output`:
a folder per stage, the log, and in `final/` the model in bfloat16.
"""

import argparse
import json
import logging
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import build
import recipe
import torch
from build import save
from dataset import NanoDataset, size_of
from grounding import GroundedTraining, GroundingCollator
from monitoring import LOG, Monitor
from optimizer import MuonAdamW
from recipe import Stage
from running import load, steps_done, training_arguments
from torch.utils.data import default_collate
from tower import LabelledPictures, TowerPretraining
from transformers import AutoModel, AutoProcessor, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from vila.training_vila import VilaDataCollator, train_only

logger = logging.getLogger("nano")
OUTPUT = Path(__file__).resolve().parents[2] / "nano-run"
FINAL, PLAN = "final", "plan.json"
TIMED_BATCHES = 3
MEASUREMENTS = 10  # per stage


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="about how long all stages take together, on this machine")
    parser.add_argument("--samples", type=float, default=1.0, help="times the recipe's conversations per stage")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in recipe.STAGES], help="default: all")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these of the mixtures, for experiments")
    parser.add_argument("--start", type=Path, help="folder of a model to start from (default: random weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the arithmetic (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (default: %(default)s)")
    parser.add_argument("--frozen-language-model", action="store_true", help="ablation: frozen behind the first stage")
    parser.add_argument("--pairs", action="store_true", help="ablation: one picture per conversation")
    parser.add_argument("--no-text", action="store_true", help="ablation: no text-only data behind the first stage")
    options = parser.parse_args(arguments)
    planned = recipe.recipe(options.frozen_language_model, options.pairs, not options.no_text, options.tasks)
    options.planned = tuple(stage for stage in planned if not options.stages or stage.name in options.stages)
    return options


def seconds_per_sample(trainee: Any, collator: Any, stage: Stage, seed: int) -> float:
    """Mean over the mixture."""
    if not stage.mixture:
        pictures = LabelledPictures(build.PATCH, stage.batch_size, seed)
        return seconds_per_row(trainee, collator, pictures, stage.batch_size)
    seconds = seconds_per_size(trainee, collator, stage, seed)
    return sum(share * seconds[size_of(task)] for task, share in stage.mixture.items()) / sum(stage.mixture.values())


def seconds_per_size(model: Any, collator: Any, stage: Stage, seed: int) -> dict[str, float]:
    """Seconds that a conversation of every size takes."""
    seconds: dict[str, float] = {}
    for size in dict.fromkeys(map(size_of, stage.mixture)):
        alike = {task: share for task, share in stage.mixture.items() if size_of(task) == size}
        rows = NanoDataset(alike, stage.batch_size, seed)
        seconds[size] = seconds_per_row(model, collator, rows, stage.batch_size)
    return seconds


def seconds_per_row(trainee: Any, collator: Any, dataset: Any, batch_size: int) -> float:
    """Seconds that a row takes, forward and backward, from a few batches."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    trainee.to(device).train()
    rows = iter(dataset)
    for number in range(TIMED_BATCHES + 1):
        if number == 1:  # the first one is slower than all others
            started = time.monotonic()
        batch = collator(list(islice(rows, batch_size)))
        with torch.autocast(device.type, torch.bfloat16):
            loss = trainee(**{name: tensor.to(device) for name, tensor in batch.items()})["loss"]
        loss.backward()
        trainee.zero_grad()
    return (time.monotonic() - started) / TIMED_BATCHES / batch_size


def plan_steps(folder: Path, options: argparse.Namespace, stage: Stage, model: Any, collator: Any) -> int:
    """Optimiser steps of a stage; kept in its folder, so that a run that goes on has the same schedule."""
    path = folder / PLAN
    if path.is_file():
        return json.loads(path.read_text())["steps"]
    rows = stage.batch_size * recipe.ACCUMULATION
    samples, pace, shares = stage.samples * options.samples, None, sum(stage.share for stage in options.planned)
    if options.minutes is not None:
        pace = seconds_per_sample(model, collator, stage, options.seed)
        samples = 60 * options.minutes * stage.share / shares / pace
    steps = max(1, round(samples / rows))
    path.write_text(json.dumps({"steps": steps, "rows_per_step": rows, "seconds_per_sample": pace}))
    return steps


def batches_done(checkpoint: str | None) -> int:
    """Device batches that a checkpoint has seen."""
    return steps_done(checkpoint) * recipe.ACCUMULATION


def materials(stage: Stage, model: Any, processor: Any, seed: int, start: int) -> tuple[Any, Any, Any]:
    """What is trained in a stage, the collator and the stream, which begins with batch number `start`."""
    if not stage.mixture:
        data = LabelledPictures(build.PATCH, stage.batch_size, seed, start)
        return TowerPretraining(model.model.vision_tower), default_collate, data
    data, tuned = NanoDataset(stage.mixture, stage.batch_size, seed, start), train_only(model, stage.tuned)
    if stage.grounded:
        return GroundedTraining(tuned), GroundingCollator(processor), data
    return tuned, VilaDataCollator(processor), data


def run_stage(stage: Stage, start: Path, folder: Path, options: argparse.Namespace) -> None:
    """Trains one stage from the model in `start`; the result goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed)
    model, processor = load(start), AutoProcessor.from_pretrained(start)
    last = get_last_checkpoint(str(folder))
    trainee, collator, data = materials(stage, model, processor, options.seed, batches_done(last))
    steps = plan_steps(folder, options, stage, trainee, collator)
    rows_per_step, every = stage.batch_size * recipe.ACCUMULATION, max(1, steps // MEASUREMENTS)
    trainer = Trainer(
        trainee,
        training_arguments(
            folder,
            steps,
            per_device_train_batch_size=stage.batch_size,
            gradient_accumulation_steps=recipe.ACCUMULATION,
            learning_rate=stage.learning_rate,
            lr_scheduler_type=stage.schedule,
            seed=options.seed,
            dataloader_num_workers=options.workers,
            dataloader_prefetch_factor=4 if options.workers else None,
        ),
        data_collator=collator,
        train_dataset=data,
        processing_class=processor,
        optimizers=(MuonAdamW(trainee, stage.learning_rate, recipe.WEIGHT_DECAY, recipe.BETA2), None),
        callbacks=[Monitor(options.output / LOG, stage, processor, rows_per_step, every)],
    )
    trainer.train(resume_from_checkpoint=last)
    save(model, processor, folder / FINAL, torch.float32)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    current = options.start or options.output / "untrained"
    if options.start is None and not (current / "config.json").is_file():
        build.build(current, options.seed)
    for stage in options.planned:
        folder = options.output / stage.name
        if not (folder / FINAL / "config.json").is_file():
            logger.info("Stage %s: %s on %s", stage.name, ", ".join(stage.tuned), ", ".join(stage.mixture) or "labels")
            run_stage(stage, current, folder, options)
        current = folder / FINAL
    processor = AutoProcessor.from_pretrained(current)
    save(AutoModel.from_pretrained(current, dtype="float32"), processor, options.output / FINAL, torch.bfloat16)
    sys.stdout.write(f"{options.output / FINAL}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
