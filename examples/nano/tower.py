"""Pre-training of the vision tower, in place of the trained one that the family starts from.

A linear head says for every quarter of a patch what is drawn there: a thing's shape and colour, and how many things
have that shape; or a character, its place in its text and that text's line. That is many answers for one pass of the
tower alone, where a conversation about a picture gives a few for a pass of the whole model. The head is thrown away.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from build import PIXEL_MEAN, PIXEL_STD
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
from reading import draw_items
from running import weighed_loss
from scenes import MAX_COUNT, counted_scene, draw_counts
from streams import row_numbers
from torch import nn
from torch.utils.data import IterableDataset
from vocabulary import COLOURS, LETTERS, MAX_LETTERS, SHAPES, TRAINED_PAIRS, Split, draw_string

CHARACTERS = LETTERS + LETTERS.lower() + "0123456789"
MAX_LINES = 6
# numbers of every kind of label; 0 stands for none of them
KINDS = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "count": MAX_COUNT,
    "character": len(CHARACTERS),
    "place": MAX_LETTERS,
    "line": MAX_LINES,
}
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

    def add_things(self, things: list[Thing]) -> None:
        for thing in things:
            inside_x = np.abs(self.centres - thing.x)[None, :] ** 2
            inside = inside_x + np.abs(self.centres - thing.y)[:, None] ** 2 < (0.9 * thing.radius) ** 2
            self.maps[0][inside] = SHAPES.index(thing.shape) + 1
            self.maps[1][inside] = COLOUR_NUMBERS[thing.colour]
            self.maps[2][inside] = min(MAX_COUNT, sum(other.shape == thing.shape for other in things))

    def add_text(self, corner: tuple[float, float], text: str, face: Any, line: int) -> None:
        """The cells whose centres lie in a character's advance and in the height of the text."""
        height = text_size(text, face)[1]
        rows = (self.centres >= corner[1]) & (self.centres < corner[1] + height)
        for number, character in enumerate(text):
            left, right = (corner[0] + face.getlength(text[:end]) for end in (number, number + 1))
            cells = np.ix_(rows, (self.centres >= left) & (self.centres < right))
            self.maps[3][cells] = CHARACTERS.index(character) + 1
            self.maps[4][cells] = number + 1
            self.maps[5][cells] = line + 1


def draw_labelled(rng: random.Random, split: Split, patch: int) -> tuple[Image.Image, np.ndarray]:
    """A picture of one tile with things, texts or both, and its label maps `(kinds, side, side)`."""
    labels, mode = Labels(patch), rng.choice(("things", "counted", "texts", "texts", "slip", "both"))
    picture = blank(rng, SIDE, SIDE, SCALE)
    pen = ImageDraw.Draw(picture)
    add_clutter(rng, pen, SIDE, SIDE)
    things = []
    if mode == "counted":
        things = counted_scene(rng, draw_counts(rng, split, rng.choice(SHAPES), rng.randint(0, MAX_COUNT)))
    elif mode in ("things", "both"):
        things = scattered(rng)
    for thing in things:
        draw_thing(pen, thing, jitter(rng, COLOURS[thing.colour]))
    labels.add_things(things)
    picture = picture.reduce(SCALE)
    if mode == "slip":
        write_slip(rng, split, ImageDraw.Draw(picture), labels)
    elif mode in ("texts", "both"):
        lines = rng.randint(1, MAX_LINES) if mode == "texts" else 1
        write_lines(rng, split, ImageDraw.Draw(picture), labels, lines)
    return add_noise(rng, picture), labels.maps


def scattered(rng: random.Random) -> list[Thing]:
    """One to four things of any size."""
    radii = [rng.uniform(10, 22) for _ in range(rng.randint(1, 4))]
    return [Thing(*rng.choice(TRAINED_PAIRS), *spot, radius) for spot, radius in zip(place(rng, radii), radii)]


def write_lines(rng: random.Random, split: Split, pen: ImageDraw.ImageDraw, labels: Labels, lines: int) -> None:
    """So many lines of capitals and numbers, each in any font that fits, with as many strings as fit."""
    step, colour = SIDE / lines, ink(rng)
    for line in range(lines):
        text = draw_string(rng, split)
        face = any_font(rng, 12, min(26, int(step)) if step > 14 else 14)
        while text_size(text, face)[0] > SIDE - 4:
            face = any_font(rng, 12, 16)
        width, height = text_size(text, face)
        x = round(rng.uniform(1, SIDE - width - 2))
        y = round(line * step + rng.uniform(0, max(0.0, step - height - 1)))
        while x + width < SIDE - 1:
            draw_text(pen, (x, y), text, face, colour)
            labels.add_text((x, y), text, face, line)
            x, text = x + width + rng.randint(8, 16), draw_string(rng, split)
            width = text_size(text, face)[0]


def write_slip(rng: random.Random, split: Split, pen: ImageDraw.ImageDraw, labels: Labels) -> None:
    """Goods on the left, prices on the right, in one font."""
    items, face, colour = draw_items(rng, split), any_font(rng, 13, 16), ink(rng)
    step = (SIDE - 4) / len(items)
    for line, (name, price) in enumerate(items):
        y = round(line * step + rng.uniform(0, max(0.0, step - 16)))
        for text, is_right in ((name, False), (str(price), True)):
            x = round(SIDE - text_size(text, face)[0] - rng.uniform(3, 8) if is_right else rng.uniform(3, 8))
            draw_text(pen, (x, y), text, face, colour)
            labels.add_text((x, y), text, face, line)


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
        for number in row_numbers(self.start):
            rng = random.Random(f"tower/{self.split}/{self.seed}/{number}")
            yield from (self.row(rng) for _ in range(self.batch_size))

    def row(self, rng: random.Random) -> dict[str, torch.Tensor]:
        picture, maps = draw_labelled(rng, self.split, self.patch)
        pixels = (np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 255 - PIXEL_MEAN) / PIXEL_STD
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
        """`logits`: for each of `KINDS` `(batch, classes, side, side)`; `loss`: the sum of their cross entropies."""
        features = self.norm(self.tower(pixel_values=pixel_values).last_hidden_state)
        side = int(features.shape[1] ** 0.5)
        cells = self.head(features).unflatten(1, (side, side)).unflatten(3, (QUARTERS, QUARTERS, -1))
        maps = cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        logits = maps.split([number + 1 for number in KINDS.values()], dim=1)
        if labels is None:
            return {"logits": logits}
        losses = [weighed_loss(logit, labels[:, kind]) for kind, logit in enumerate(logits)]
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
