"""Tasks about clips: a direction, the order of two events, a count of flashes.

The answer lies in the order of the frames alone: the same frames in any order are equally likely under every answer
(direction, order: every clip has its reverse; flashes: the lamp is on in equally many frames however often it
flashes), so that shuffling them leaves nothing but chance. Events last `FRAMES_PER_STEP` frames and start on whole
steps, so that pooling so many frames in time loses none.
"""

import random

from drawing import SCALE, SIDE, Thing, add_clutter, add_noise, blank, draw_thing, jitter
from episodes import Episode, Turn, video_block
from phrasings import ask
from PIL import Image, ImageDraw
from scenes import tags
from vocabulary import COLOURS, Split, draw_pair

FRAMES_PER_STEP, STEPS = 2, 6
FRAMES = FRAMES_PER_STEP * STEPS
LIT_STEPS, MAX_FLASHES = 3, 3
CLIP_NOISE = (3, 7, 15)
LAMP_OFF, LAMP_ON = (70, 70, 80), (255, 236, 120)


def draw_ground(rng: random.Random) -> Image.Image:
    """What all frames of a clip share."""
    picture = blank(rng, SIDE, SIDE, SCALE)
    add_clutter(rng, ImageDraw.Draw(picture), SIDE, SIDE)
    return picture


def finish(rng: random.Random, frame: Image.Image, bits: int) -> Image.Image:
    return add_noise(rng, frame.reduce(SCALE), bits)


def direction(rng: random.Random, split: Split) -> Episode:
    """A thing moves along one axis; the question names both ways."""
    pair = draw_pair(rng, split)
    thing, is_level = " ".join(pair), rng.random() < 0.5
    radius, bits = rng.uniform(10, 16), rng.choice(CLIP_NOISE)
    start = rng.uniform(radius + 2, SIDE * 0.4)
    end = rng.uniform(SIDE * 0.6, SIDE - radius - 2)
    across = rng.uniform(radius + 2, SIDE - radius - 2)
    path = [start + (end - start) * number / (FRAMES - 1) for number in range(FRAMES)]
    ways = ("right", "left") if is_level else ("down", "up")
    is_reversed = rng.random() < 0.5
    if is_reversed:
        path.reverse()
    ground, fill, frames = draw_ground(rng), jitter(rng, COLOURS[pair[0]]), []
    for along in path:
        frame = ground.copy()
        spot = (along, across) if is_level else (across, along)
        draw_thing(ImageDraw.Draw(frame), Thing(*pair, *spot, radius), fill)
        frames.append(finish(rng, frame, bits))
    one, other = rng.sample(ways, 2)
    fields = {"thing": thing, "one": one, "other": other}
    question = ask(rng, split, "direction", **fields)
    turn = Turn(question, ways[is_reversed], "words", 0.5, tags([pair], "direction", question, **fields))
    return Episode("direction", (turn,), ((video_block(frames),),))


def order(rng: random.Random, split: Split) -> Episode:
    """Two things appear and go, one after the other."""
    pairs = [draw_pair(rng, split), draw_pair(rng, split)]
    while pairs[0] == pairs[1]:
        pairs[1] = draw_pair(rng, split)
    length = rng.randint(1, 2)
    first_start = rng.randint(0, STEPS - 2 * length - 1)
    second_start = rng.randint(first_start + length, STEPS - length)
    ground, bits, shown = draw_ground(rng), rng.choice(CLIP_NOISE), []
    for pair in pairs:
        radius = rng.uniform(12, 20)
        spot = rng.uniform(radius, SIDE - radius), rng.uniform(radius, SIDE - radius)
        frame = ground.copy()
        draw_thing(ImageDraw.Draw(frame), Thing(*pair, *spot, radius), jitter(rng, COLOURS[pair[0]]))
        shown.append(frame)
    frames = []
    for number in range(FRAMES):
        step = number // FRAMES_PER_STEP
        is_first = first_start <= step < first_start + length
        is_second = second_start <= step < second_start + length
        frames.append(finish(rng, shown[0] if is_first else shown[1] if is_second else ground, bits))
    names = [" ".join(pair) for pair in pairs]
    one, other = rng.sample(names, 2)
    question = ask(rng, split, "order", one=one, other=other)
    turn = Turn(question, names[0], "words", 0.5, tags(pairs, "order", question, one=one, other=other))
    return Episode("order", (turn,), ((video_block(frames),),))


def flash_pattern(rng: random.Random, flashes: int) -> list[bool]:
    """Whether the lamp is on in every step: `LIT_STEPS` of them, in that many runs."""
    while True:
        lit = set(rng.sample(range(STEPS), LIT_STEPS))
        if sum(step - 1 not in lit for step in lit) == flashes:
            return [step in lit for step in range(STEPS)]


def flashes(rng: random.Random, split: Split) -> Episode:
    """A lamp that is on in half of the steps, in one, two or three flashes."""
    number = rng.randint(1, MAX_FLASHES)
    pattern, bits = flash_pattern(rng, number), rng.choice(CLIP_NOISE)
    radius = rng.uniform(14, 26)
    x, y = rng.uniform(radius + 2, SIDE - radius - 2), rng.uniform(radius + 2, SIDE - radius - 2)
    lamps = []
    ground = draw_ground(rng)
    for colour in (LAMP_OFF, LAMP_ON):
        frame = ground.copy()
        box = tuple(value * SCALE for value in (x - radius, y - radius, x + radius, y + radius))
        ImageDraw.Draw(frame).ellipse(box, fill=jitter(rng, colour), outline=(60, 60, 60), width=SCALE)
        lamps.append(frame)
    frames = [finish(rng, lamps[is_on], bits) for is_on in pattern for _ in range(FRAMES_PER_STEP)]
    question = ask(rng, split, "flashes")
    turn = Turn(question, str(number), "number", 1 / MAX_FLASHES, tags([], "flashes", question))
    return Episode("flashes", (turn,), ((video_block(frames),),))


def shuffled(episode: Episode, rng: random.Random) -> Episode:
    """The same question about the same frames in another order."""
    frames = list(episode.media[-1][0]["video"])
    rng.shuffle(frames)
    return episode.with_media(*episode.media[:-1], (video_block(frames),))
