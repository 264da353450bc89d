"""Training of the encoder on canvases, in place of the trained one that VILA-HD starts from.

Linear heads say for every quarter of a patch what is drawn there, as in `tower.py` of vila-nano. In a patch of the
large canvas: a character, its place in its code and the colour of the thing that the code belongs to, or a thing's
shape and colour. In the low-resolution view: things, and where the code of which thing is. The heads are thrown away.

Half of the canvases show nothing but blocks full of codes: many letters for one pass.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from build_hd import LOW_SIDE, PATCH
from canvases import (
    CELL,
    CELLS,
    CODE_LENGTH,
    CODE_LETTERS,
    FONT_SIZES,
    SIDE,
    Canvas,
    Spot,
    add_clutter,
    add_noise,
    cells_of,
    draw_canvas,
    draw_code,
    edges_of,
)
from drawing import any_font, draw_text, ground_colour, ink, text_size
from PIL import Image, ImageDraw
from running import weighed_loss
from streams import row_numbers
from torch import nn
from torch.utils.data import IterableDataset
from vocabulary import COLOURS, SHAPES, Split

CHARACTERS = CODE_LETTERS + "0123456789"
# numbers of every kind of label; 0 stands for none of them
LARGE_KINDS = {
    "character": len(CHARACTERS),
    "place": CODE_LENGTH,
    "owner": len(COLOURS),
    "shape": len(SHAPES),
    "colour": len(COLOURS),
}
LOW_KINDS = {"owner": len(COLOURS), "shape": len(SHAPES), "colour": len(COLOURS)}
COLOUR_NUMBERS = {colour: number for number, colour in enumerate(COLOURS, start=1)}
QUARTERS = 2  # per side of a patch
LABELLED_CELLS = 12  # of the large canvas that a row shows
BLOCK = 2  # cells per side of a block of codes
VALIDATION_ROWS = 24


class Labels:
    """What is drawn at every quarter of a patch: for each kind a map of `side` x `side` numbers.

    Args:
        cell: pixels of a canvas that a quarter has per side.
    """

    def __init__(self, kinds: dict[str, int], cell: float):
        self.kinds, self.cell, self.side = list(kinds), cell, round(SIDE / cell)
        self.maps = np.zeros((len(kinds), self.side, self.side), dtype=np.int64)
        self.centres = (np.arange(self.side) + 0.5) * cell

    def put(self, kind: str, rows: Any, columns: Any, number: int) -> None:
        self.maps[self.kinds.index(kind)][np.ix_(rows, columns)] = number

    def add_thing(self, spot: Spot) -> None:
        thing = spot.thing
        inside_x = (self.centres - thing.x)[None, :] ** 2
        inside = inside_x + (self.centres - thing.y)[:, None] ** 2 < (0.9 * thing.radius) ** 2
        self.maps[self.kinds.index("shape")][inside] = SHAPES.index(thing.shape) + 1
        self.maps[self.kinds.index("colour")][inside] = COLOUR_NUMBERS[thing.colour]

    def add_owner(self, spot: Spot) -> None:
        """All quarters that a code touches."""
        left, upper, right, lower = (edge / self.cell for edge in spot.box)
        at = np.arange(self.side)
        rows, columns = (at + 1 > upper) & (at < lower), (at + 1 > left) & (at < right)
        self.put("owner", rows, columns, COLOUR_NUMBERS[spot.thing.colour])

    def add_code(self, code: str, upper: float, lower: float, edges: tuple[float, ...], owner: int) -> None:
        """The quarters whose centres lie in a character's advance and in the height of the code."""
        rows = (self.centres >= upper) & (self.centres < lower)
        for number, character in enumerate(code):
            columns = (self.centres >= edges[number]) & (self.centres < edges[number + 1])
            self.put("character", rows, columns, CHARACTERS.index(character) + 1)
            self.put("place", rows, columns, number + 1)
            self.put("owner", rows, columns, owner)


def label(canvas: Canvas) -> tuple[Labels, Labels]:
    """Labels of the large canvas and of the low-resolution view."""
    large, low = Labels(LARGE_KINDS, PATCH / QUARTERS), Labels(LOW_KINDS, PATCH / QUARTERS * SIDE / LOW_SIDE)
    for spot in canvas.spots:
        large.add_thing(spot)
        large.add_code(spot.code, spot.box[1], spot.box[3], spot.edges, COLOUR_NUMBERS[spot.thing.colour])
        low.add_thing(spot)
        low.add_owner(spot)
    return large, low


def draw_blocks(rng: random.Random, split: Split) -> tuple[Image.Image, Labels, list[int]]:
    """A canvas with blocks full of codes, its labels and the cells of the blocks."""
    picture, labels = Image.new("RGB", (SIDE, SIDE), ground_colour(rng)), Labels(LARGE_KINDS, PATCH / QUARTERS)
    pen, cells, side = ImageDraw.Draw(picture), list[int](), CELL * BLOCK
    add_clutter(rng, pen)
    for number in rng.sample(range((CELLS // BLOCK) ** 2), LABELLED_CELLS // BLOCK**2):
        row, column = (BLOCK * index for index in divmod(number, CELLS // BLOCK))
        cells += [(row + i) * CELLS + column + j for i in range(BLOCK) for j in range(BLOCK)]
        y, end = row * CELL + rng.uniform(2, 12), column * CELL + side - 2
        while True:
            face, colour = any_font(rng, *FONT_SIZES), ink(rng)
            if y + FONT_SIZES[1] > row * CELL + side:
                break
            x, code = column * CELL + rng.uniform(2, 50), draw_code(rng, split)
            while x + text_size(code, face)[0] < end:
                width, height = text_size(code, face)
                left, upper = round(x), round(y)
                draw_text(pen, (left, upper), code, face, colour)
                labels.add_code(code, upper, upper + height, edges_of(left, code, face), 0)
                x, code = x + width + rng.uniform(16, 40), draw_code(rng, split)
            y += rng.uniform(26, 40)
    return add_noise(rng, picture), labels, cells


def patches_of(cells: torch.Tensor) -> torch.Tensor:
    """Row-major numbers of the patches of cells, ascending: `(..., cells) -> (..., patches)`."""
    side, each = SIDE // PATCH, CELL // PATCH
    inside = torch.arange(each)[:, None] * side + torch.arange(each)
    first = torch.div(cells, CELLS, rounding_mode="floor") * each * side + cells % CELLS * each
    return (first.unsqueeze(-1) + inside.flatten()).flatten(-2).sort(-1).values


class LabelledCanvases(IterableDataset):
    """Rows without end: `low` `(3, LOW_SIDE, LOW_SIDE)`, some `patches` of the large canvas `(K, 3, P, P)`, their
    `indices` `(K,)`, and the labels of both, `(kinds, side, side)` and `(kinds, K, 2, 2)`.

    Args:
        mean, std: of the processor.
        start: number of the first row; row n is the same wherever one starts.
    """

    def __init__(self, mean: float, std: float, seed: int = 0, start: int = 0, split: Split = "train"):
        self.mean, self.std, self.seed, self.start, self.split = mean, std, seed, start, split

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in row_numbers(self.start):
            yield self.row(random.Random(f"encoder/{self.split}/{self.seed}/{number}"), number % 2 == 0)

    def row(self, rng: random.Random, is_dense: bool) -> dict[str, torch.Tensor]:
        if is_dense:
            picture, large, cells = draw_blocks(rng, self.split)
            low = Labels(LOW_KINDS, PATCH / QUARTERS * SIDE / LOW_SIDE)
        else:
            canvas = draw_canvas(rng, self.split)
            picture, (large, low), cells = canvas.picture, label(canvas), some_cells(rng, canvas)
        indices, pixels = patches_of(torch.tensor(cells)), torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        side, whole = SIDE // PATCH, pixels.float()[None]
        grid = pixels.unflatten(2, (side, PATCH)).unflatten(1, (side, PATCH)).permute(1, 3, 0, 2, 4)
        low_pixels = F.interpolate(whole, size=(LOW_SIDE, LOW_SIDE), mode="bicubic")[0]
        maps = torch.from_numpy(large.maps).unflatten(2, (side, QUARTERS)).unflatten(1, (side, QUARTERS))
        return {
            "low": (low_pixels / 255 - self.mean) / self.std,
            "patches": (grid[indices // side, indices % side].float() / 255 - self.mean) / self.std,
            "indices": indices,
            "low_labels": torch.from_numpy(low.maps),
            "labels": maps.transpose(2, 3)[:, indices // side, indices % side],
        }


def some_cells(rng: random.Random, canvas: Canvas) -> list[int]:
    """`LABELLED_CELLS` different cells: those of codes first, then any."""
    spots = rng.sample(canvas.spots, len(canvas.spots))
    wanted = [cell for spot in spots for cell in cells_of(spot.box)]
    others = rng.sample(range(CELLS**2), LABELLED_CELLS)
    return list(dict.fromkeys(wanted[: LABELLED_CELLS - 1] + others))[:LABELLED_CELLS]


class EncoderTraining(nn.Module):
    """An encoder and the heads that label quarters of patches. The encoder's weights are changed in place."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.trunk = encoder.trunk
        channels = encoder.config.hidden_size
        self.norm, self.low_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.head = nn.Linear(channels, QUARTERS**2 * classes(LARGE_KINDS))
        self.low_head = nn.Linear(channels, QUARTERS**2 * classes(LOW_KINDS))

    def see(
        self, low: torch.Tensor, patches: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the low-resolution view and of the patches, `(B, tokens, D)` each."""
        trunk, seen = self.trunk, []
        side, large_side = LOW_SIDE // PATCH, SIDE // PATCH
        tokens = trunk.patch_embed(low) + trunk.positions(side, side)
        for block in trunk.blocks:
            tokens, keys_values = block(tokens)
            seen.append(keys_values)
        kernel = trunk.patch_embed.proj
        close = F.linear(patches.flatten(2), kernel.weight.flatten(1), kernel.bias)
        close = close + trunk.positions(large_side, large_side, indices)
        for block, keys_values in zip(trunk.blocks, seen):
            close, _ = block(close, keys_values)
        return tokens, close

    def logits(self, low: torch.Tensor, patches: torch.Tensor, indices: torch.Tensor) -> tuple[Any, Any]:
        """For each kind of patches `(B, classes, K, 2, 2)`, and of the view `(B, classes, side, side)`."""
        tokens, close = self.see(low, patches, indices)
        own = self.head(self.norm(close)).unflatten(2, (QUARTERS, QUARTERS, -1)).permute(0, 4, 1, 2, 3)
        side = LOW_SIDE // PATCH
        cells = self.low_head(self.low_norm(tokens)).unflatten(1, (side, side)).unflatten(3, (QUARTERS, QUARTERS, -1))
        maps = cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        sizes, low_sizes = ([number + 1 for number in kinds.values()] for kinds in (LARGE_KINDS, LOW_KINDS))
        return own.split(sizes, 1), maps.split(low_sizes, 1)

    def forward(
        self,
        low: torch.Tensor,
        patches: torch.Tensor,
        indices: torch.Tensor,
        low_labels: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """`loss`: the sum of the cross entropies of all kinds; shapes as of `LabelledCanvases`."""
        large, small = self.logits(low, patches, indices)
        if labels is None or low_labels is None:
            return {"logits": large}
        losses = [weighed_loss(own, labels[:, number]) for number, own in enumerate(large)]
        losses += [weighed_loss(own, low_labels[:, number]) for number, own in enumerate(small)]
        return {"loss": torch.stack(losses).sum(), "logits": large}


def classes(kinds: dict[str, int]) -> int:
    return sum(number + 1 for number in kinds.values())


@torch.no_grad()
def quality(trainee: EncoderTraining, mean: float, std: float) -> dict[str, float]:
    """Share of the quarters with something that are labelled right, on canvases of the validation split."""
    canvases = LabelledCanvases(mean, std, split="validation")
    right, total = dict.fromkeys(LARGE_KINDS, 0), dict.fromkeys(LARGE_KINDS, 0)
    trainee.eval()
    for number, row in zip(range(VALIDATION_ROWS), canvases):
        large, _ = trainee.logits(row["low"][None], row["patches"][None], row["indices"][None])
        for kind, own, labels in zip(LARGE_KINDS, large, row["labels"]):
            is_something = labels > 0
            if kind != "owner" or number % 2:  # blocks of codes have no owners
                right[kind] += int((own[0].argmax(0) == labels)[is_something].sum())
                total[kind] += int(is_something.sum())
    return {kind: right[kind] / max(total[kind], 1) for kind in LARGE_KINDS}
