"""Pre-training of the vision tower, in place of the trained one that the family starts from.

A linear head says for every quarter of a patch which character, shape and colour is drawn there. That is many answers
for one pass of the tower alone, where a conversation about a picture gives a few for a pass of the whole model. The
head is thrown away.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from drawing import (
    SCALE,
    SIDE,
    Thing,
    add_clutter,
    add_noise,
    any_font,
    blank,
    draw_text,
    draw_thing,
    ink,
    jitter,
    place,
    text_size,
)
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info
from vocabulary import COLOURS, GOODS, LETTERS, SHAPES, TRAINED_PAIRS, Split, draw_string

CHARACTERS = LETTERS + LETTERS.lower() + "0123456789"
KINDS = {"character": len(CHARACTERS), "shape": len(SHAPES), "colour": len(COLOURS)}  # and 0 for none of them
COLOUR_NUMBERS = {colour: number for number, colour in enumerate(COLOURS, start=1)}
QUARTERS = 2  # per side of a patch
VALIDATION_PICTURES = 64


class Labels:
    """What is drawn in every quarter of a patch: for each of `KINDS` a map of `side` x `side` numbers.

    Args:
        patch: pixels per side.
    """

    def __init__(self, patch: int):
        self.cell = patch / QUARTERS
        self.side = SIDE // patch * QUARTERS
        self.maps = np.zeros((len(KINDS), self.side, self.side), dtype=np.int64)
        self.centres = (np.arange(self.side) + 0.5) * self.cell

    def add_thing(self, thing: Thing) -> None:
        inside_x = np.abs(self.centres - thing.x)[None, :] ** 2
        inside = inside_x + np.abs(self.centres - thing.y)[:, None] ** 2 < (0.9 * thing.radius) ** 2
        self.maps[1][inside] = SHAPES.index(thing.shape) + 1
        self.maps[2][inside] = COLOUR_NUMBERS[thing.colour]

    def add_text(self, corner: tuple[float, float], text: str, face: Any) -> None:
        """The cells whose centres lie in a character's advance and in the height of the text."""
        height = text_size(text, face)[1]
        rows = (self.centres >= corner[1]) & (self.centres < corner[1] + height)
        for number, character in enumerate(text):
            left, right = (corner[0] + face.getlength(text[:end]) for end in (number, number + 1))
            cols = (self.centres >= left) & (self.centres < right)
            self.maps[0][np.ix_(rows, cols)] = CHARACTERS.index(character) + 1


def draw_labelled(rng: random.Random, split: Split, patch: int) -> tuple[Image.Image, np.ndarray]:
    """A picture of one tile with things, texts or both, and its label maps `(kinds, side, side)`."""
    labels, mode = Labels(patch), rng.choice(("things", "texts", "texts", "both"))
    picture = blank(rng, SIDE, SIDE, SCALE)
    pen = ImageDraw.Draw(picture)
    add_clutter(rng, pen, SIDE, SIDE)
    if mode != "texts":
        largest = rng.choice((12, 22))
        radii = [rng.uniform(8, largest) for _ in range(rng.randint(1, 4 if largest > 12 or mode == "both" else 12))]
        for spot, radius in zip(place(rng, radii), radii):
            thing = Thing(*rng.choice(TRAINED_PAIRS), *spot, radius)
            draw_thing(pen, thing, jitter(rng, COLOURS[thing.colour]))
            labels.add_thing(thing)
    picture = picture.reduce(SCALE)
    if mode != "things":
        write_lines(rng, split, ImageDraw.Draw(picture), labels, rng.randint(2, 6) if mode == "texts" else 1)
    return add_noise(rng, picture), labels.maps


def write_lines(rng: random.Random, split: Split, pen: ImageDraw.ImageDraw, labels: Labels, lines: int) -> None:
    """So many lines of capitals, numbers or goods with prices; each in any font that fits."""
    step, colour = SIDE / lines, ink(rng)
    for line in range(lines):
        text = draw_string(rng, split) if rng.random() < 0.7 else rng.choice(GOODS)
        face = any_font(rng, 12, min(26, int(step)) if step > 14 else 14)
        while text_size(text, face)[0] > SIDE - 4:
            face = any_font(rng, 12, 16)
        width, height = text_size(text, face)
        x = round(rng.uniform(1, SIDE - width - 2))
        y = round(line * step + rng.uniform(0, max(0.0, step - height - 1)))
        draw_text(pen, (x, y), text, face, colour)
        labels.add_text((x, y), text, face)


class LabelledPictures(IterableDataset):
    """Rows `{"pixel_values": (3, SIDE, SIDE), "labels": (kinds, side, side)}` without end.

    Args:
        patch: pixels per side of the tower's patches.
        batch_size: rows of a batch, which one worker draws.
        start: number of the first batch.
    """

    def __init__(self, patch: int, batch_size: int, seed: int = 0, start: int = 0, split: Split = "train"):
        self.patch, self.batch_size, self.seed, self.start, self.split = patch, batch_size, seed, start, split

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        number, stride = self.start + (worker.id if worker else 0), worker.num_workers if worker else 1
        while True:
            rng = random.Random(f"tower/{self.split}/{self.seed}/{number}")
            yield from (self.row(rng) for _ in range(self.batch_size))
            number += stride

    def row(self, rng: random.Random) -> dict[str, torch.Tensor]:
        picture, maps = draw_labelled(rng, self.split, self.patch)
        pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
        return {"pixel_values": torch.from_numpy(pixels), "labels": torch.from_numpy(maps)}


class TowerPretraining(nn.Module):
    """A tower and the head that labels quarters of patches. The tower's weights are changed in place."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower
        channels = tower.config.hidden_size
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, QUARTERS**2 * sum(number + 1 for number in KINDS.values()))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        """`logits`: for each of `KINDS` `(batch, classes, side, side)`; `loss`: their mean cross entropies, added."""
        features = self.norm(self.tower(pixel_values=pixel_values).last_hidden_state)
        side = int(features.shape[1] ** 0.5)
        cells = self.head(features).unflatten(1, (side, side)).unflatten(3, (QUARTERS, QUARTERS, -1))
        maps = cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        logits = maps.split([number + 1 for number in KINDS.values()], dim=1)
        if labels is None:
            return {"logits": logits}
        losses = [F.cross_entropy(logit.float(), labels[:, kind]) for kind, logit in enumerate(logits)]
        return {"loss": torch.stack(losses).sum(), "logits": logits}

    @torch.no_grad()
    def accuracies(self) -> dict[str, float]:
        """Share of the cells with something in them that are labelled right, on pictures of the validation split."""
        rows = iter(LabelledPictures(self.tower.config.patch_size, VALIDATION_PICTURES, split="validation"))
        batch = torch.utils.data.default_collate([next(rows) for _ in range(VALIDATION_PICTURES)])
        device = self.head.weight.device
        labels, logits = batch["labels"].to(device), self(batch["pixel_values"].to(device))["logits"]
        found = {}
        for kind, (name, logit) in enumerate(zip(KINDS, logits)):
            drawn = labels[:, kind] > 0
            found[f"tower_{name}"] = (logit.argmax(1) == labels[:, kind])[drawn].float().mean().item()
        return found
