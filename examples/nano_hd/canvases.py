"""Large canvases: a few big coloured things, and beside each of them a code in small print.

- Every thing of a canvas has another colour. A question names one thing by colour and shape and asks for its code.
- A code is two capitals and two digits; like all printed strings it belongs to one split by its digest.
- The print is 17 to 22 pixels high on 1512: what shows the whole canvas at a sixth of that cannot show it.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from drawing import (
    CLUTTER,
    Thing,
    any_font,
    draw_text,
    draw_thing,
    ground_colour,
    ink,
    jitter,
    place,
    text_size,
)
from episodes import Episode, Turn, image_block
from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont
from vocabulary import COLOURS, Split, draw_pair, split_of

SIDE = 1512  # pixels of a canvas
CELL = 108  # pixels of a cell, of which the encoder looks at whole ones
CELLS = SIDE // CELL
MIN_THINGS, MAX_THINGS = 5, 8
RADII = (66.0, 92.0)
FONT_SIZES = (24, 30)
GAPS = (6, 18)  # pixels between a thing and its code
LOT = 118  # pixels around a thing that its code may take
NOISE_BITS = (3, 7, 15, 31)
CODE_LETTERS, CODE_LENGTH = "ABCDEFGHJKLMNPRSTUVWXYZ", 4
QUESTIONS = (
    "What is the code at the {thing}?",
    "Which code is printed at the {thing}?",
    "Read the code at the {thing}.",
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Spot:
    """A thing and its code.

    Attributes:
        box: left, upper, right and lower edge of the code's ink in pixels.
        edges: where its characters begin, and the last one ends, in pixels from the left.
    """

    thing: Thing
    code: str
    box: Box
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Canvas:
    """A picture of `SIDE` x `SIDE` and what it shows."""

    picture: Image.Image
    spots: tuple[Spot, ...]


def random_code(rng: random.Random) -> str:
    return rng.choice(CODE_LETTERS) + rng.choice(CODE_LETTERS) + f"{rng.randrange(100):02d}"


def draw_code(rng: random.Random, split: Split) -> str:
    """A code of the split."""
    while split_of(code := random_code(rng)) != split:
        pass
    return code


def draw_codes(rng: random.Random, split: Split, count: int) -> list[str]:
    """Different codes of the split."""
    codes = dict[str, None]()
    while len(codes) < count:
        codes[draw_code(rng, split)] = None
    return list(codes)


def draw_things(rng: random.Random, split: Split, count: int) -> list[Thing]:
    """Things of different colours, with room for their codes around them."""
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        colour, shape = draw_pair(rng, split)
        pairs.setdefault(colour, shape)
    radii = [rng.uniform(*RADII) for _ in pairs]
    centres = place(rng, [radius + LOT for radius in radii], SIDE, SIDE)
    return [Thing(*pair, *centre, radius) for pair, centre, radius in zip(pairs.items(), centres, radii)]


def print_code(rng: random.Random, pen: ImageDraw.ImageDraw, thing: Thing, code: str) -> Spot:
    """Prints a code on one of the four sides of a thing."""
    face = any_font(rng, *FONT_SIZES)
    width, height = text_size(code, face)
    gap, slip = thing.radius + rng.uniform(*GAPS), rng.uniform(-20, 20)
    corner = {
        "right": (thing.x + gap, thing.y + slip - height / 2),
        "left": (thing.x - gap - width, thing.y + slip - height / 2),
        "above": (thing.x + slip - width / 2, thing.y - gap - height),
        "below": (thing.x + slip - width / 2, thing.y + gap),
    }[rng.choice(("right", "left", "above", "below"))]
    left, upper = round(corner[0]), round(corner[1])
    draw_text(pen, (left, upper), code, face, ink(rng))
    return Spot(thing, code, (left, upper, left + width, upper + height), edges_of(left, code, face))


def edges_of(left: float, text: str, face: FreeTypeFont) -> tuple[float, ...]:
    return tuple(left + face.getlength(text[:end]) for end in range(len(text) + 1))


def add_clutter(rng: random.Random, pen: ImageDraw.ImageDraw) -> None:
    """Grey dots and lines, which no question is about."""
    for _ in range(rng.randint(0, 24)):
        x, y, fill = rng.uniform(0, SIDE), rng.uniform(0, SIDE), jitter(rng, CLUTTER)
        if rng.random() < 0.5:
            size = rng.uniform(2, 9)
            pen.ellipse((x - size, y - size, x + size, y + size), fill=fill)
        else:
            length, angle = rng.uniform(20, 120), rng.uniform(0, math.pi)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            pen.line(((x, y), end), fill=fill, width=rng.randint(2, 4))


def add_noise(rng: random.Random, picture: Image.Image) -> Image.Image:
    """Darkens every pixel by up to any of `NOISE_BITS`."""
    pixels, most = np.asarray(picture), rng.choice(NOISE_BITS)
    noise = np.frombuffer(rng.randbytes(pixels[..., 0].size), np.uint8).reshape(*pixels.shape[:2], 1) & np.uint8(most)
    return Image.fromarray(pixels - np.minimum(pixels, noise))


def draw_canvas(rng: random.Random, split: Split) -> Canvas:
    picture = Image.new("RGB", (SIDE, SIDE), ground_colour(rng))
    pen = ImageDraw.Draw(picture)
    add_clutter(rng, pen)
    things = draw_things(rng, split, rng.randint(MIN_THINGS, MAX_THINGS))
    for thing in things:
        draw_thing(pen, thing, jitter(rng, COLOURS[thing.colour]), scale=1)
    codes = draw_codes(rng, split, len(things))
    spots = tuple(print_code(rng, pen, thing, code) for thing, code in zip(things, codes))
    return Canvas(add_noise(rng, picture), spots)


def cells_of(box: Box) -> list[int]:
    """Row-major numbers of the cells that a box touches."""
    columns, rows = (range(box[side] // CELL, min((box[side + 2] - 1) // CELL, CELLS - 1) + 1) for side in (0, 1))
    return [row * CELLS + column for row in rows for column in columns]


def question_of(rng: random.Random, spot: Spot) -> str:
    return rng.choice(QUESTIONS).format(thing=spot.thing.name)


def code_episode(rng: random.Random, split: Split) -> tuple[Episode, Canvas, Spot]:
    """A canvas and the question for one of its codes."""
    canvas = draw_canvas(rng, split)
    spot = rng.choice(canvas.spots)
    held_out = ("string",) if split == "test" else ()
    turn = Turn(question_of(rng, spot), spot.code, "words", 0.0, held_out)
    return Episode("code", (turn,), ((image_block(canvas.picture),),)), canvas, spot
