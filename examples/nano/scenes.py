"""Tasks about scenes of things: what they are, where they are, how many; and two pictures compared.

Test questions are the last of an episode and alone; in training a scene is asked about several times, which costs
little more than once.
"""

import random

from drawing import SIDE, Thing, draw_things, place
from episodes import Episode, Turn, image_block
from phrasings import ask, is_held_out
from vocabulary import COLOURS, HELD_OUT_PAIRS, SHAPES, TRAINED_PAIRS, Split, draw_pair

MAX_COUNT = 9
MAX_COUNTED_DISTRACTORS = 3
MIN_OFFSET = 14  # pixels by which a relation must hold


def tags(pairs: list[tuple[str, str]], kind: str, question: str, **fields: object) -> tuple[str, ...]:
    """What about a question was never trained on."""
    pair = ("pair",) if any(pair in HELD_OUT_PAIRS for pair in pairs) else ()
    return pair + (("phrasing",) if is_held_out(kind, question, **fields) else ())


def draw_scene(rng: random.Random, split: Split, count: int, smallest: float = 11, largest: float = 21) -> list[Thing]:
    """`count` different things, no two with the same colour and shape."""
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < count:
        pairs[draw_pair(rng, split)] = None
    radii = [rng.uniform(smallest, largest if count < 4 else 16) for _ in pairs]
    spots = place(rng, radii)
    return [Thing(*pair, *spot, radius) for pair, spot, radius in zip(pairs, spots, radii)]


def name_turn(rng: random.Random, split: Split, scene: list[Thing]) -> Turn | None:
    """Asks for colour and shape of a thing alone, or for one by the other where that is unique."""
    if len(scene) == 1:
        thing, question = scene[0], ask(rng, split, "name")
        held_out = tags([(thing.colour, thing.shape)], "name", question)
        return Turn(question, thing.name, "words", 1 / (len(COLOURS) * len(SHAPES)), held_out)
    kind, given, wanted = rng.choice((("colour", "shape", "colour"), ("shape", "colour", "shape")))
    unique = [t for t in scene if sum(getattr(t, given) == getattr(o, given) for o in scene) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    fields = {given: getattr(thing, given)}
    question = ask(rng, split, kind, **fields)
    chance = 1 / len(COLOURS if wanted == "colour" else SHAPES)
    held_out = tags([(thing.colour, thing.shape)], kind, question, **fields)
    return Turn(question, getattr(thing, wanted), "words", chance, held_out)


def presence_turn(rng: random.Random, split: Split, scene: list[Thing]) -> Turn:
    """Asks for a thing that is there, or for one that differs in colour, shape or both from one that is."""
    present = {(thing.colour, thing.shape) for thing in scene}
    thing = rng.choice(scene)
    pair, is_there = (thing.colour, thing.shape), rng.random() < 0.5
    while not is_there and pair in present:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        pair = rng.choice(((thing.colour, shape), (colour, thing.shape), (colour, shape)))
        if split != "test" and pair in HELD_OUT_PAIRS:
            pair = (thing.colour, thing.shape)
    name = " ".join(pair)
    question = ask(rng, split, "presence", thing=name)
    return Turn(question, "yes" if is_there else "no", "yes_no", 0.5, tags([pair], "presence", question, thing=name))


def position_turn(rng: random.Random, split: Split, scene: list[Thing]) -> Turn | None:
    """Asks whether one thing is left of, right of, above or below another; for half of them the reverse holds."""
    if len(scene) < 2:
        return None
    first, second = rng.sample(scene, 2)
    dx, dy = second.x - first.x, second.y - first.y
    options = [r for r, ok in zip(("left of", "above"), (abs(dx) >= MIN_OFFSET, abs(dy) >= MIN_OFFSET)) if ok]
    if not options:
        return None
    relation = rng.choice(options)
    holds = dx > 0 if relation == "left of" else dy > 0
    if rng.random() < 0.5:
        relation, holds = {"left of": "right of", "above": "below"}[relation], not holds
    fields = {"first": first.name, "second": second.name, "relation": relation}
    question = ask(rng, split, "position", **fields)
    pairs = [(first.colour, first.shape), (second.colour, second.shape)]
    return Turn(question, "yes" if holds else "no", "yes_no", 0.5, tags(pairs, "position", question, **fields))


def place_words(thing: Thing) -> str:
    """Where a thing is: `"top left"`, `"centre"` and so on, in thirds of the picture."""
    row = ("top", "", "bottom")[min(2, int(thing.y * 3 / SIDE))]
    col = ("left", "", "right")[min(2, int(thing.x * 3 / SIDE))]
    return f"{row} {col}".strip() or "centre"


def describe_turn(rng: random.Random, scene: list[Thing]) -> Turn:
    """All things from top to bottom, with their places."""
    ordered = sorted(scene, key=lambda thing: thing.y)
    text = ", ".join(f"{thing.name} {place_words(thing)}" for thing in ordered)
    return Turn(ask(rng, "train", "describe"), text)


def scene_episode(task: str, turns: list[Turn], rng: random.Random, scene: list[Thing]) -> Episode:
    return Episode(task, tuple(turns), ((image_block(draw_things(rng, scene)),),), (tuple(scene),))


def naming(rng: random.Random, split: Split) -> Episode:
    while True:
        scene = draw_scene(rng, split, rng.choice((1, 1, 2, 3)))
        turns = [name_turn(rng, split, scene) for _ in range(1 if split == "test" or len(scene) == 1 else 3)]
        if found := [turn for turn in turns if turn is not None]:
            return scene_episode("naming", found, rng, scene)


def yes_no(rng: random.Random, split: Split) -> Episode:
    while True:
        scene = draw_scene(rng, split, rng.randint(2, 4))
        makers = (presence_turn, position_turn)
        turns = [rng.choice(makers)(rng, split, scene) for _ in range(1 if split == "test" else 4)]
        if found := [turn for turn in turns if turn is not None]:
            return scene_episode("yes_no", found, rng, scene)


def caption(rng: random.Random, split: Split) -> Episode:
    """One picture, one description: what aligning a projector, and pre-training on pairs, is fed with."""
    scene = draw_scene(rng, split, rng.randint(1, 4))
    return scene_episode("caption", [describe_turn(rng, scene)], rng, scene)


def dialogue(rng: random.Random, split: Split) -> Episode:
    """A description and questions about the same scene."""
    scene = draw_scene(rng, split, rng.randint(2, 4))
    turns: list[Turn | None] = [describe_turn(rng, scene)]
    turns += [rng.choice((name_turn, presence_turn, position_turn))(rng, split, scene) for _ in range(3)]
    rng.shuffle(turns)
    return scene_episode("dialogue", [turn for turn in turns if turn is not None], rng, scene)


def counted_scene(rng: random.Random, counts: dict[tuple[str, str], int]) -> list[Thing]:
    """So many things of every pair, in random places; the more there are, the smaller."""
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    largest = 12 if len(pairs) <= 6 else 10
    radii = [rng.uniform(8, largest) for _ in pairs]
    return [Thing(*pair, *spot, radius) for pair, spot, radius in zip(pairs, place(rng, radii), radii)]


def other_pairs(rng: random.Random, split: Split, shape: str, count: int) -> list[tuple[str, str]]:
    """Pairs of other shapes, of one's own split."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        pair = draw_pair(rng, split)
        if pair[1] != shape:
            pairs.append(pair)
    return pairs


def draw_counts(rng: random.Random, split: Split, shape: str, count: int) -> dict[tuple[str, str], int]:
    """`count` things of one shape in one or two colours, and a few of other shapes."""
    allowed = [pair for pair in TRAINED_PAIRS if pair[1] == shape]
    if split == "test":
        allowed += [pair for pair in sorted(HELD_OUT_PAIRS) if pair[1] == shape]
    counts: dict[tuple[str, str], int] = {}
    colours = rng.sample(allowed, rng.randint(1, 2))
    for _ in range(count):
        pair = rng.choice(colours)
        counts[pair] = counts.get(pair, 0) + 1
    for pair in other_pairs(rng, split, shape, rng.randint(0 if count else 1, MAX_COUNTED_DISTRACTORS)):
        counts[pair] = counts.get(pair, 0) + 1
    return counts


def count_turn(rng: random.Random, split: Split, counts: dict[tuple[str, str], int], shape: str) -> Turn:
    number = sum(count for pair, count in counts.items() if pair[1] == shape)
    things = plural(shape)
    question = ask(rng, split, "count", things=things)
    pairs = [pair for pair in counts if pair[1] == shape]
    held_out = tags(pairs, "count", question, things=things)
    return Turn(question, str(number), "number", 1 / (MAX_COUNT + 1), held_out)


def count(rng: random.Random, split: Split) -> Episode:
    """How many things of a shape there are; every number from 0 to `MAX_COUNT` is equally frequent."""
    shape = rng.choice(SHAPES)
    counts = draw_counts(rng, split, shape, rng.randint(0, MAX_COUNT))
    turns = [count_turn(rng, split, counts, shape)]
    if split != "test":
        others = sorted({pair[1] for pair in counts} - {shape})
        turns += [count_turn(rng, split, counts, other) for other in others[:2]]
        rng.shuffle(turns)
    return scene_episode("count", turns, rng, counted_scene(rng, counts))


def compare(rng: random.Random, split: Split) -> Episode:
    """Which of two pictures has more things of a shape, or has a thing at all."""
    if rng.random() < 0.5:
        return compare_presence(rng, split)
    shape = rng.choice(SHAPES)
    while True:
        numbers = rng.randint(0, MAX_COUNT), rng.randint(0, MAX_COUNT)
        if abs(numbers[0] - numbers[1]) >= 2:
            break
    scenes = [counted_scene(rng, draw_counts(rng, split, shape, number)) for number in numbers]
    things = plural(shape)
    question = ask(rng, split, "more", things=things)
    pairs = [(t.colour, t.shape) for scene in scenes for t in scene if t.shape == shape]
    answer = "first" if numbers[0] > numbers[1] else "second"
    turn = Turn(question, answer, "words", 0.5, tags(pairs, "more", question, things=things))
    return two_pictures(rng, turn, scenes)


def compare_presence(rng: random.Random, split: Split) -> Episode:
    scenes = [draw_scene(rng, split, rng.randint(1, 3)) for _ in range(2)]
    own = [{(thing.colour, thing.shape) for thing in scene} for scene in scenes]
    picked = rng.randrange(2)
    candidates = sorted(own[picked] - own[1 - picked])
    if not candidates:
        return compare_presence(rng, split)
    pair = rng.choice(candidates)
    name = " ".join(pair)
    question = ask(rng, split, "which", thing=name)
    answer = ("first", "second")[picked]
    return two_pictures(rng, Turn(question, answer, "words", 0.5, tags([pair], "which", question, thing=name)), scenes)


def two_pictures(rng: random.Random, turn: Turn, scenes: list[list[Thing]]) -> Episode:
    blocks = tuple(image_block(draw_things(rng, scene)) for scene in scenes)
    return Episode("compare", (turn,), (blocks,), tuple(map(tuple, scenes)))


def plural(shape: str) -> str:
    return {"cross": "crosses"}.get(shape, shape + "s")
