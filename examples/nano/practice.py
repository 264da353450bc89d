"""Conversations for training alone: many questions about a picture, and some that the test does not ask.

Whether one thing is left of another is yes as often as no for whatever is named, so that each answer alone teaches
little. What is asked here has answers that lead there: where a thing is, which of two is further to one side, all of
them in order; how many there are in each picture before which has more.
"""

import random
from collections.abc import Callable

from drawing import Thing, draw_things
from episodes import Episode, Turn, image_block
from phrasings import ask
from scenes import (
    MAX_COUNT,
    MIN_OFFSET,
    count_turn,
    counted_scene,
    describe_turn,
    draw_counts,
    draw_scene,
    name_turn,
    place_words,
    plural,
    position_turn,
    presence_turn,
    scene_episode,
)
from vocabulary import SHAPES, Split

TURNS = 7
SIDES: dict[str, Callable[[Thing], float]] = {
    "left": lambda thing: thing.x,
    "right": lambda thing: -thing.x,
    "top": lambda thing: thing.y,
    "bottom": lambda thing: -thing.y,
}


def place_turn(rng: random.Random, split: Split, scene: list[Thing]) -> Turn:
    thing = rng.choice(scene)
    return Turn(f"Where is the {thing.name}?", place_words(thing))


def side_turn(rng: random.Random, split: Split, scene: list[Thing]) -> Turn | None:
    """Which of two things is more to one side."""
    if len(scene) < 2:
        return None
    first, second = rng.sample(scene, 2)
    side = rng.choice(list(SIDES))
    ahead = SIDES[side](second) - SIDES[side](first)
    if abs(ahead) < MIN_OFFSET:
        return None
    question = f"Which is more to the {side}, the {first.name} or the {second.name}?"
    return Turn(question, (first if ahead > 0 else second).name)


def ordered_turn(rng: random.Random, split: Split, scene: list[Thing]) -> Turn:
    """All things from one side to the other."""
    side, other = rng.choice((("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")))
    ordered = sorted(scene, key=SIDES[side])
    return Turn(f"Name all from {side} to {other}.", ", ".join(thing.name for thing in ordered))


def shape_first_turn(rng: random.Random, split: Split, scene: list[Thing]) -> Turn:
    """Shapes, then their colours: neither is guessed from the other, as a pair that was never shown would be."""
    ordered = sorted(scene, key=SIDES["left"])
    return Turn("Name shape and colour from left to right.", ", ".join(f"{t.shape} {t.colour}" for t in ordered))


def described_turn(rng: random.Random, split: Split, scene: list[Thing]) -> Turn:
    return describe_turn(rng, scene)


# yes or no about positions twice as often as everything else
LOOKED = (
    *(name_turn, presence_turn, position_turn, position_turn),
    *(place_turn, side_turn, ordered_turn, shape_first_turn, described_turn),
)


def look(rng: random.Random, split: Split) -> Episode:
    """What a few things are, and how they lie."""
    while True:
        scene = draw_scene(rng, split, rng.choice((1, 2, 2, 3, 4)))
        asked: list[Turn | None] = [maker(rng, split, scene) for maker in rng.choices(LOOKED, k=TURNS)]
        if turns := [turn for turn in dict.fromkeys(asked) if turn is not None]:
            return scene_episode("look", turns, rng, scene)


def tally(rng: random.Random, split: Split) -> Episode:
    """How many there are of every shape, of none too."""
    shape = rng.choice(SHAPES)
    counts = draw_counts(rng, split, shape, rng.randint(0, MAX_COUNT))
    others = rng.sample([other for other in SHAPES if other != shape], 4)
    turns = [count_turn(rng, split, counts, own) for own in (shape, *others)]
    rng.shuffle(turns)
    return scene_episode("tally", turns, rng, counted_scene(rng, counts))


def contrast(rng: random.Random, split: Split) -> Episode:
    """Which of two pictures has more of what, or has it at all; of some the counts are asked first."""
    while True:
        numbers = rng.randint(0, MAX_COUNT), rng.randint(0, MAX_COUNT)
        shape = rng.choice(SHAPES)
        counted = [draw_counts(rng, split, shape, number) for number in numbers]
        turns: list[Turn] = []
        for own in (shape, *rng.sample(SHAPES, 2)):
            found = [sum(count for pair, count in counts.items() if pair[1] == own) for counts in counted]
            if rng.random() < 0.4:
                turns += [how_many_turn(own, which, found[which]) for which in rng.sample(range(2), 2)]
            if abs(found[0] - found[1]) >= (2 if own == shape else 1):
                answer = "first" if found[0] > found[1] else "second"
                turns.append(Turn(ask(rng, split, "more", things=plural(own)), answer))
        for which in rng.sample(range(2), 2):
            if only := sorted(set(counted[which]) - set(counted[1 - which])):
                name = " ".join(rng.choice(only))
                turns.append(Turn(ask(rng, split, "which", thing=name), ("first", "second")[which]))
        if turns:
            break
    rng.shuffle(turns)
    scenes = [counted_scene(rng, counts) for counts in counted]
    blocks = tuple(image_block(draw_things(rng, scene)) for scene in scenes)
    return Episode("contrast", tuple(dict.fromkeys(turns)), (blocks,), tuple(map(tuple, scenes)))


def how_many_turn(shape: str, which: int, number: int) -> Turn:
    place = ("first", "second")[which]
    return Turn(f"How many {plural(shape)} are in the {place} picture?", str(number))
