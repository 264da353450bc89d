"""Drawing with Pillow: grounds with noise and clutter, shapes, texts.

Shapes are drawn at twice the size and reduced, which smooths their edges; texts are smoothed by FreeType itself.
Everything random comes from one `random.Random`, whose numbers are the same on every machine.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from fonts import NAMES, font
from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont
from vocabulary import COLOURS, LETTERS

SIDE = 112  # pixels of a tile
SCALE = 2  # shapes are drawn so many times as large
NOISE_BITS = (3, 7, 15, 31)  # largest value that is added to every pixel
CLUTTER = (168, 168, 176)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """A shape in a picture: centre and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def ground_colour(rng: random.Random) -> Colour:
    """Light, nearly grey."""
    base = rng.randint(205, 240)
    return (base + rng.randint(-10, 10), base + rng.randint(-10, 10), base + rng.randint(-10, 10))


def blank(rng: random.Random, width: int = SIDE, height: int = SIDE, scale: int = 1) -> Image.Image:
    return Image.new("RGB", (width * scale, height * scale), ground_colour(rng))


def jitter(rng: random.Random, colour: Colour, amount: int = 12) -> Colour:
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def shape_outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of the shapes that are polygons."""
    if shape == "square":
        half = radius * 0.85
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)]
    if shape == "star":
        spokes = [(radius * (0.42 if i % 2 else 1.08), math.pi * (i / 5 - 0.5)) for i in range(10)]
        return [(x + length * math.cos(angle), y + length * math.sin(angle)) for length, angle in spokes]
    arm, end = radius * 0.34, radius
    corners = [(-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm)]
    corners += [(arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm)]
    return [(x + dx, y + dy) for dx, dy in corners]


def draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, fill: Colour, scale: int = SCALE) -> None:
    x, y, radius = thing.x * scale, thing.y * scale, thing.radius * scale
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=fill, width=max(scale * 2, round(radius * 0.36)))
    else:
        pen.polygon(shape_outline(thing.shape, x, y, radius), fill=fill)


def add_clutter(rng: random.Random, pen: ImageDraw.ImageDraw, width: int, height: int, scale: int = SCALE) -> None:
    """Grey dots and thin lines, which no question is about."""
    for _ in range(rng.randint(0, 6)):
        x, y = rng.uniform(0, width) * scale, rng.uniform(0, height) * scale
        fill = jitter(rng, CLUTTER)
        if rng.random() < 0.5:
            size = rng.uniform(0.6, 1.6) * scale
            pen.ellipse((x - size, y - size, x + size, y + size), fill=fill)
        else:
            length = rng.uniform(4, 14) * scale
            angle = rng.uniform(0, math.pi)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            pen.line(((x, y), end), fill=fill, width=scale)


def add_noise(rng: random.Random, picture: Image.Image, bits: int | None = None) -> Image.Image:
    """Adds up to `bits` (by default any of `NOISE_BITS`) to every channel of every pixel."""
    most = rng.choice(NOISE_BITS) if bits is None else bits
    pixels = np.asarray(picture)
    noise = np.frombuffer(rng.randbytes(pixels.size), np.uint8).reshape(pixels.shape) & np.uint8(most)
    # dark pixels get lighter and light ones darker: nothing leaves the range
    return Image.fromarray(np.where(pixels < 128, pixels + noise, pixels - noise))


def draw_things(rng: random.Random, things: Iterable[Thing], width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A cluttered, noisy picture of things."""
    picture = blank(rng, width, height, SCALE)
    pen = ImageDraw.Draw(picture)
    add_clutter(rng, pen, width, height)
    for thing in things:
        draw_thing(pen, thing, jitter(rng, COLOURS[thing.colour]))
    return add_noise(rng, picture.reduce(SCALE))


def place(
    rng: random.Random, radii: list[float], width: int = SIDE, height: int = SIDE, gap: float = 3
) -> list[tuple[float, float]]:
    """Centres of circles that do not touch; crowds are drawn anew until they fit.

    Args:
        radii: in pixels.
        gap: pixels between two circles.
    """
    while True:
        placed: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(40):
                x, y = rng.uniform(radius + 1, width - radius - 1), rng.uniform(radius + 1, height - radius - 1)
                spots = zip(placed, radii)
                if all((x - u) ** 2 + (y - v) ** 2 >= (radius + other + gap) ** 2 for (u, v), other in spots):
                    placed.append((x, y))
                    break
            else:
                break
        if len(placed) == len(radii):
            return placed


def any_font(rng: random.Random, smallest: int, largest: int) -> FreeTypeFont:
    """Any of the fonts in `smallest` to `largest` pixels."""
    return font(rng.choice(NAMES), rng.randint(smallest, largest))


def text_size(text: str, face: FreeTypeFont) -> tuple[int, int]:
    """Width and height in pixels of the ink of a text."""
    left, top, right, bottom = face.getbbox(text)
    return math.ceil(right - left), math.ceil(bottom - top)


def draw_text(
    pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, face: FreeTypeFont, fill: Colour
) -> None:
    """Puts the upper left corner of a text's ink at `corner`, in pixels."""
    left, top, _, _ = face.getbbox(text)
    pen.text((round(corner[0] - left), round(corner[1] - top)), text, fill=fill, font=face)


def ink(rng: random.Random) -> Colour:
    """Dark, of any hue."""
    return (rng.randint(0, 80), rng.randint(0, 80), rng.randint(0, 90))


def random_letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(length))
