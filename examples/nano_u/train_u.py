"""Trains vila-u-nano from random weights: `python examples/nano_u/train_u.py`.

First the codes (tower, codebooks, pixel decoder), then with these frozen the language model, the depth transformer and
the projector, on drawing and answering at once. A run that was stopped goes on when the same command is given again.
"""

import argparse
import json
import logging
import sys
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

import torch
from build_u import build, save
from codes_training import CodesTraining, LabelledScenes, normalise, quality
from drawing_training import DrawingCollator, DrawingTraining
from drawn_scenes import DrawnScenes
from running import FINAL, cosine_arguments, load, parse_options, run_stage, run_stages
from torch.utils.data import default_collate
from transformers import AutoModel, AutoProcessor

logger = logging.getLogger("nano_u")
OUTPUT = Path(__file__).resolve().parents[2] / "nano-u-run"
NORMALISED = 256  # pictures that the mean of features is taken from
CODES_STEPS, CODES_BATCH, CODES_RATE = 3000, 16, 2e-3
STEPS, BATCH, RATE = 3000, 32, 2e-3
CAPTION_DROPOUT = 0.1
DRAWING = 0.85  # share of rows; the questions are learned within a thousand steps


def train_codes(start: Path, folder: Path, options: argparse.Namespace) -> None:
    model, processor = AutoModel.from_pretrained(start, dtype="float32"), AutoProcessor.from_pretrained(start)
    patch = model.config.vision_config.patch_size
    rows = partial(LabelledScenes, patch, options.seed)
    training = cosine_arguments(folder, CODES_STEPS, CODES_BATCH, CODES_RATE, options)
    run_stage(CodesTraining(model.model), training, rows, default_collate)
    some = list(islice(rows(), NORMALISED))
    normalise(model.model.eval(), torch.stack([row["pixel_values"] for row in some]))
    logger.info("Reconstruction: %s", json.dumps(quality(model.model)))
    save(model, processor, folder / FINAL, torch.float32)


def train_language(start: Path, folder: Path, options: argparse.Namespace) -> None:
    model, processor = load(start), AutoProcessor.from_pretrained(start)
    model.model.vision_tower.requires_grad_(False)  # the codes stay what they are
    collator = DrawingCollator(processor, model.config.vision_config.patch_size, CAPTION_DROPOUT)
    training = cosine_arguments(folder, STEPS, BATCH, RATE, options)
    run_stage(DrawingTraining(model), training, partial(DrawnScenes, DRAWING, options.seed), collator)
    save(model, processor, folder / FINAL, torch.float32)


STAGES = {"codes": train_codes, "language": train_language}


def main(arguments: list[str]) -> None:
    options = parse_options("train_u.py", __doc__, OUTPUT, arguments)
    current = run_stages(build, STAGES, options)
    model, final = AutoModel.from_pretrained(current, dtype="float32"), options.output / FINAL
    save(model, AutoProcessor.from_pretrained(current), final, torch.bfloat16)
    sys.stdout.write(f"{final}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"train_u.py: {error}")
