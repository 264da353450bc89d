"""The rule that says what a drawn picture shows: pieces that are not ground, their colours and their shapes.

A piece is compared with every shape as `drawing` draws it, both stretched to the same square.
"""

from functools import cache

import numpy as np
from drawing import SCALE, Thing, draw_thing
from drawn_scenes import RELATIONS, SIDE, Scene
from PIL import Image, ImageDraw
from vocabulary import COLOURS, SHAPES

MIN_CONTRAST = 60  # of a pixel that is not ground, the sum over its channels
MIN_PIECE = 40  # pixels; smaller pieces are taken for noise
MAX_SIDE = 36  # of a piece that is a shape: everything drawn is smaller
MIN_OVERLAP = 0.6  # with the likeliest shape, intersection over union
GRID = 24  # shapes are compared at that size


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts of a mask, neighbours across corners included, those of `MIN_PIECE` pixels and more."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        height, width = labels.shape
        around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        spread = np.where(mask, np.max(around, axis=0), 0)
        if (spread == labels).all():
            break
        labels = spread
    found = [labels == label for label in np.unique(labels[mask])]
    return [piece for piece in found if piece.sum() >= MIN_PIECE]


def stretched(mask: np.ndarray) -> np.ndarray:
    """The part of a mask that is not empty, as `(GRID, GRID)`."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    picture = Image.fromarray(part.astype(np.uint8) * 255).resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(picture) > 127


@cache
def template(shape: str) -> np.ndarray:
    picture = Image.new("L", (SIDE * SCALE, SIDE * SCALE))
    pen = ImageDraw.Draw(picture)
    draw_thing(pen, Thing("black", shape, SIDE / 2, SIDE / 2, 11), 255)  # type: ignore[arg-type]
    return stretched(np.asarray(picture.reduce(SCALE)) > 127)


def shape_of(mask: np.ndarray) -> str | None:
    """The shape that a piece overlaps with most; None if it is like none, or too large."""
    if max(mask.any(0).sum(), mask.any(1).sum()) > MAX_SIDE:
        return None
    part = stretched(mask)
    overlaps = {s: (part & template(s)).sum() / (part | template(s)).sum() for s in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def look(picture: Image.Image) -> list[tuple[str, str | None, float, float]]:
    """Colour, shape and centre, x and y, of every piece of a picture."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE))).astype(float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    mask = np.abs(pixels - np.median(border, axis=0)).sum(-1) > MIN_CONTRAST
    names, table = list(COLOURS), np.array(list(COLOURS.values()), dtype=float)
    seen = []
    for piece in pieces(mask):
        # edges are mixed with the ground: the colour of most pixels counts
        distances = np.square(pixels[piece][:, None] - table).sum(-1)
        colour = names[np.bincount(distances.argmin(1), minlength=len(names)).argmax()]
        ys, xs = np.nonzero(piece)
        seen.append((colour, shape_of(piece), (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2))
    return seen


def is_right(scene: Scene, picture: Image.Image) -> bool:
    """Whether a picture shows the things that a scene's text names, no others, and as they lie to each other."""
    seen = look(picture)
    wanted = [(thing.colour, thing.shape) for thing in scene.things]
    if sorted(map(str, wanted)) != sorted(str(one[:2]) for one in seen):
        return False
    if scene.relation is None:
        return True
    first, second = sorted(seen, key=lambda one: wanted.index(one[:2]))  # type: ignore[arg-type]
    dx, dy = RELATIONS[scene.relation]
    along, across = (
        (second[2] - first[2]) * dx + (second[3] - first[3]) * dy,
        (second[2] - first[2]) * dy + (second[3] - first[3]) * dx,
    )
    return along > abs(across)
