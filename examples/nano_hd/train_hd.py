"""Trains vila-hd-nano from vila-nano: `python examples/nano_hd/train_hd.py`.

First the encoder, by labelling what is drawn where; then, with the encoder's blocks frozen, what chooses the patches,
the projector and the language model, on questions for codes. A run that was stopped goes on when the same command is
given again.
"""

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

import torch
from build_hd import build, save
from encoder_training import EncoderTraining, LabelledCanvases, quality
from looking_training import AskedCanvases, AskedCollator, LookingTraining, success
from optimizer import MATRICES
from running import FINAL, cosine_arguments, load, parse_options, run_stage, run_stages
from torch.utils.data import default_collate
from transformers import AutoProcessor

logger = logging.getLogger("nano_hd")
OUTPUT = Path(__file__).resolve().parents[2] / "nano-hd-run"
ENCODER_STEPS, ENCODER_BATCH, ENCODER_RATE = 600, 16, 2e-3
READING_STEPS, READING_BATCH, READING_RATE = 1200, 8, 1.5e-3
LOOKING_STEPS, LOOKING_BATCH, LOOKING_RATE = 150, 8, 6e-4
TRAINED_MATRICES = (*MATRICES, ".trunk.blocks.", ".multi_modal_projector.layers.")  # with Muon


def train_encoder(start: Path, folder: Path, options: argparse.Namespace) -> None:
    model, processor = load(start), AutoProcessor.from_pretrained(start)
    mean, std = (values[0] for values in (processor.image_processor.image_mean, processor.image_processor.image_std))
    trainee, rows = EncoderTraining(model.model.vision_tower), partial(LabelledCanvases, mean, std, options.seed)
    training = cosine_arguments(folder, ENCODER_STEPS, ENCODER_BATCH, ENCODER_RATE, options)
    run_stage(trainee, training, rows, default_collate, TRAINED_MATRICES)
    logger.info("Labelled right: %s", json.dumps(quality(trainee, mean, std)))
    save(model, processor, folder / FINAL, torch.float32)


def train_reading(start: Path, folder: Path, options: argparse.Namespace) -> None:
    """Several codes of a canvas at once, shown where they are."""
    train_answers(start, folder, options, True, READING_STEPS, READING_BATCH, READING_RATE)


def train_looking(start: Path, folder: Path, options: argparse.Namespace) -> None:
    """One code, which the model looks for itself."""
    train_answers(start, folder, options, False, LOOKING_STEPS, LOOKING_BATCH, LOOKING_RATE)


def train_answers(
    start: Path, folder: Path, options: argparse.Namespace, is_shown: bool, steps: int, batch: int, rate: float
) -> None:
    model, processor = load(start), AutoProcessor.from_pretrained(start)
    trainee, rows = LookingTraining(model), partial(AskedCanvases, is_shown, options.seed)
    training = cosine_arguments(folder, steps, batch, rate, options)
    run_stage(trainee, training, rows, AskedCollator(processor), TRAINED_MATRICES)
    logger.info("Codes within what is looked at: %s", json.dumps(success(trainee, processor)))
    save(model, processor, folder / FINAL, torch.float32)


STAGES = {"encoder": train_encoder, "reading": train_reading, "looking": train_looking}


def main(arguments: list[str]) -> None:
    options = parse_options("train_hd.py", __doc__, OUTPUT, arguments)
    current = run_stages(build, STAGES, options)
    save(load(current), AutoProcessor.from_pretrained(current), options.output / FINAL, torch.bfloat16)
    sys.stdout.write(f"{options.output / FINAL}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"train_hd.py: {error}")
