"""Small pictures of one or two things, the words that ask for them, and questions about them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from drawing import SCALE, Thing, add_noise, blank, draw_thing, jitter
from episodes import Message, image_block, text_block
from PIL import Image, ImageDraw
from streams import row_numbers
from torch.utils.data import IterableDataset
from vocabulary import COLOURS, SHAPES, Split, draw_pair

SIDE = 64  # pixels of a picture
RADII = (9.0, 12.5)
NOISE = 3  # most that is added to a channel
MIN_OFFSET, MAX_SLANT = 24, 12  # pixels along and across the relation
SINGLES, TRAINED_SINGLES = 0.25, 0.4  # share of the scenes of one thing; of those that training draws
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # way to the second thing
DESCRIBED = ("left of", "above")  # a description begins with the thing on the left, or at the top
DESCRIBE = "What do you see?"


@dataclass(frozen=True)
class Scene:
    """One thing, or two and how the first lies to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        """What asks for the scene: `"a red circle left of a blue square"`."""
        names = [with_article(thing.name) for thing in self.things]
        return f" {self.relation} ".join(names)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def draw_scene(
    rng: random.Random, split: Split, relations: tuple[str, ...] = tuple(RELATIONS), singles: float = SINGLES
) -> Scene:
    """A scene of two things, of one in a share `singles` of the cases; the two are of different kinds and do not
    touch."""
    radii = [rng.uniform(*RADII) for _ in range(2)]
    if rng.random() < singles:
        x, y = (rng.uniform(radii[0] + 2, SIDE - radii[0] - 2) for _ in range(2))
        return Scene((Thing(*draw_pair(rng, split), x, y, radii[0]),))
    relation = rng.choice(relations)
    dx, dy = RELATIONS[relation]
    while True:
        (x, y), (u, v) = ([rng.uniform(r + 2, SIDE - r - 2) for _ in range(2)] for r in radii)
        along, across = (u - x) * dx + (v - y) * dy, (u - x) * dy + (v - y) * dx
        if along >= max(MIN_OFFSET, sum(radii) + 4) and abs(across) <= MAX_SLANT:
            break
    first = draw_pair(rng, split)
    while (second := draw_pair(rng, split)) == first:
        pass
    return Scene((Thing(*first, x, y, radii[0]), Thing(*second, u, v, radii[1])), relation)


def draw_picture(rng: random.Random, scene: Scene) -> Image.Image:
    picture = blank(rng, SIDE, SIDE, SCALE)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        draw_thing(pen, thing, jitter(rng, COLOURS[thing.colour]))
    return add_noise(rng, picture.reduce(SCALE), NOISE)


def around(centres: np.ndarray, thing: Thing) -> np.ndarray:
    """Which points of a grid lie in the circle around a thing."""
    return (centres[None, :] - thing.x) ** 2 + (centres[:, None] - thing.y) ** 2 < thing.radius**2


def label_patches(scene: Scene, patch: int) -> np.ndarray:
    """Numbers of the shape and of the colour at the centre of every patch, `(2, patches)`; 0 for neither."""
    centres = (np.arange(SIDE // patch) + 0.5) * patch
    labels = np.zeros((2, len(centres), len(centres)), np.int64)
    for thing in scene.things:
        named = [[SHAPES.index(thing.shape) + 1], [list(COLOURS).index(thing.colour) + 1]]
        labels[:, around(centres, thing)] = np.array(named)
    return labels.reshape(2, -1)


def questions(rng: random.Random, scene: Scene) -> list[tuple[str, str]]:
    """Questions about a scene of `DESCRIBED` relations, with their answers; the description first."""
    found = [(DESCRIBE, scene.text)]
    thing = rng.choice(scene.things)
    if len({thing.colour for thing in scene.things}) == len(scene.things):
        found.append((f"Which shape is {thing.colour}?", thing.shape))
    if len({thing.shape for thing in scene.things}) == len(scene.things):
        found.append((f"Which colour has the {thing.shape}?", thing.colour))
    asked = rng.choice((thing.name, f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"))
    found.append((f"Is there {with_article(asked)}?", "yes" if any(t.name == asked for t in scene.things) else "no"))
    return found


def answer(text: str) -> Message:
    return {"role": "assistant", "content": [text_block(text)]}


def drawing_row(rng: random.Random, split: Split) -> tuple[list[Message], Scene]:
    """A request and its picture, and what is drawn."""
    scene = draw_scene(rng, split, singles=TRAINED_SINGLES)
    drawn = {"role": "assistant", "content": [image_block(draw_picture(rng, scene))]}
    return [{"role": "user", "content": [text_block(scene.text)]}, drawn], scene


def answering_row(rng: random.Random, split: Split) -> list[Message]:
    """A picture and several questions about it."""
    scene = draw_scene(rng, split, DESCRIBED)
    asked, media = questions(rng, scene), [image_block(draw_picture(rng, scene))]
    rng.shuffle(asked)
    messages: list[Message] = []
    for question, text in asked:
        messages += [{"role": "user", "content": [*media, text_block(question)]}, answer(text)]
        media = []
    return messages


class DrawnScenes(IterableDataset):
    """Endless rows `{"messages": [...]}` for `VilaUDataCollator`; row number n is the same wherever one starts.

    Rows that ask for a picture have its `"scene"` too.

    Args:
        drawing: share of the rows that ask for a picture; the others are questions.
        start: number of the first row.
    """

    def __init__(self, drawing: float = 0.7, seed: int = 0, start: int = 0, split: Split = "train"):
        self.drawing, self.seed, self.start, self.split = drawing, seed, start, split

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in row_numbers(self.start):
            rng = random.Random(f"{self.split}/{self.seed}/{number}")
            if rng.random() < self.drawing:
                messages, scene = drawing_row(rng, self.split)
                yield {"messages": messages, "scene": scene}
            else:
                yield {"messages": answering_row(rng, self.split)}
