"""Videos of any length with things that appear for a moment: what the long-context recipe trains and is tested on.

Most frames are empty. A few things of different colours and shapes appear for two frames each, and a question asks for
the colour of one of them: it is answered by finding the right moment, not by knowing what a video is about.
"""

import math
import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "nano"))

from clips import CLIP_NOISE, FRAMES_PER_STEP, draw_ground, finish
from dataset import TASKS, length_of
from drawing import COLOURS, SIDE, Thing, draw_thing, jitter
from episodes import Block, Message, text_block, video_block
from phrasings import ask
from PIL import Image, ImageDraw
from vocabulary import SHAPES, Split, draw_pair

__all__ = ["COLOURS", "SHAPES", "LongTexts", "Needles", "needle"]

# different empty frames of a video, and things that appear in it
GROUNDS, THINGS = 16, 4
MIN_FRAMES = 2 * THINGS * FRAMES_PER_STEP


def draw_things(rng: random.Random, split: Split) -> list[tuple[str, str]]:
    """`THINGS` pairs of colour and shape that share neither."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < THINGS:
        colour, shape = draw_pair(rng, split)
        if all(colour != other and shape != another for other, another in pairs):
            pairs.append((colour, shape))
    return pairs


def draw_video(rng: random.Random, frames: int, pairs: list[tuple[str, str]], steps: list[int]) -> Block:
    """A video in which each thing appears in its step, `FRAMES_PER_STEP` frames long."""
    ground, bits = draw_ground(rng), rng.choice(CLIP_NOISE)
    empty = [finish(rng, ground, bits) for _ in range(GROUNDS)]
    shown = list[Image.Image]()
    for number in range(frames):
        shown.append(empty[number % GROUNDS])
    for pair, step in zip(pairs, steps, strict=True):
        radius = rng.uniform(14, 22)
        spot = rng.uniform(radius, SIDE - radius), rng.uniform(radius, SIDE - radius)
        frame = ground.copy()
        draw_thing(ImageDraw.Draw(frame), Thing(*pair, *spot, radius), jitter(rng, COLOURS[pair[0]]))
        for number in range(FRAMES_PER_STEP):
            shown[FRAMES_PER_STEP * step + number] = finish(rng, frame, bits)
    return video_block(shown)


def needle(seed: str, frames: int, depth: float, split: Split = "validation") -> tuple[list[Message], str]:
    """A question about a thing at a depth, and its answer, a colour.

    Args:
        seed: the same one gives the same pixels.
        frames: of the video, at least `MIN_FRAMES`.
        depth: 0 for the first frames, 1 for the last.
    """
    if frames < MIN_FRAMES or not 0 <= depth <= 1:
        raise ValueError(f"a needle needs at least {MIN_FRAMES} frames and a depth of 0 to 1, got {frames}, {depth}")
    rng, total = random.Random(seed), frames // FRAMES_PER_STEP
    pairs, step = draw_things(rng, split), round(depth * (total - 1))
    others = rng.sample([other for other in range(total) if other != step], THINGS - 1)
    video = draw_video(rng, frames, pairs, [step, *others])
    question = ask(rng, split, "colour", shape=pairs[0][1])
    return [{"role": "user", "content": [video, text_block(question)]}], pairs[0][0]


class Needles:
    """Training rows: a video of random length and a question about each of its things, in random order.

    Args:
        rows: how many there are; each is drawn from its number, so that a run that goes on sees the same ones.
        max_frames: the lengths are spread evenly on a logarithmic scale up to this, at least `MIN_FRAMES`.
    """

    def __init__(self, rows: int, max_frames: int, seed: int = 0):
        if max_frames < MIN_FRAMES:
            raise ValueError(f"videos that are drawn have at least {MIN_FRAMES} frames, not {max_frames}")
        self.rows, self.max_frames, self.seed = rows, max_frames, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = random.Random(f"needles/{self.seed}/{number}")
        frames = round(math.exp(rng.uniform(math.log(MIN_FRAMES), math.log(self.max_frames))))
        frames = max(MIN_FRAMES, frames // FRAMES_PER_STEP * FRAMES_PER_STEP)
        pairs = draw_things(rng, "train")
        video = draw_video(rng, frames, pairs, rng.sample(range(frames // FRAMES_PER_STEP), THINGS))
        messages: list[Message] = []
        for turn, (colour, shape) in enumerate(rng.sample(pairs, THINGS)):
            question = text_block(ask(rng, "train", "colour", shape=shape))
            messages.append({"role": "user", "content": [question] if turn else [video, question]})
            messages.append({"role": "assistant", "content": [text_block(colour)]})
        return {"messages": messages}


class LongTexts:
    """Training rows without media: conversations about texts, as many as fill a context.

    Args:
        tokens: that a row has at least, about.
    """

    def __init__(self, rows: int, tokens: int, seed: int = 0):
        self.rows, self.tokens, self.seed = rows, tokens, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng, messages, length = random.Random(f"texts/{self.seed}/{number}"), list[Message](), 0
        while length < self.tokens:
            episode = TASKS["text"](rng, "train")
            messages += episode.messages
            length += length_of(episode)
        return {"messages": messages}
