"""Few-shot learning: pictures with made-up names that hold for one conversation only.

Four kinds of things have four names; the first question lists the names. Who was shown k of the four kinds knows k of
the names and can only guess among the others.
"""

import random

from drawing import SIDE, Thing, draw_things
from episodes import Episode, Turn, image_block
from phrasings import ask, is_held_out
from vocabulary import HELD_OUT_PAIRS, Split, draw_names, draw_pair

KINDS = 4
SHOTS = (0, 1, 2, 4)
MAX_TRAINED_PICTURES = 7


def draw_kinds(rng: random.Random, split: Split) -> list[tuple[str, str]]:
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < KINDS:
        pairs[draw_pair(rng, split)] = None
    return list(pairs)


def place_one(rng: random.Random, pair: tuple[str, str]) -> Thing:
    """A thing of that kind, in any place and size."""
    radius = rng.uniform(14, 30)
    return Thing(*pair, rng.uniform(radius, SIDE - radius), rng.uniform(radius, SIDE - radius), radius)


def episode(rng: random.Random, split: Split, shown: list[int]) -> Episode:
    """A conversation about one picture per entry of `shown`, each the number of a kind."""
    kinds, names = draw_kinds(rng, split), draw_names(rng, split, KINDS)
    turns, media, things = [], [], []
    listed = ", ".join(rng.sample(names, KINDS))
    for number, kind in enumerate(shown):
        key, fields = ("again", {}) if number else ("names", {"names": listed})
        question = ask(rng, split, key, **fields)
        held_out = ("string",) if split == "test" else ()
        held_out += ("pair",) if split == "test" and kinds[kind] in HELD_OUT_PAIRS else ()
        held_out += ("phrasing",) if is_held_out(key, question, **fields) else ()
        turns.append(Turn(question, names[kind], "words", 1 / KINDS, held_out))
        things.append((place_one(rng, kinds[kind]),))
        media.append((image_block(draw_things(rng, things[-1])),))
    return Episode("fewshot", tuple(turns), tuple(media), tuple(things))


def few_shot(rng: random.Random, split: Split, shots: int) -> Episode:
    """`shots` pictures of different kinds with their names, then one of any of the four kinds."""
    kinds = rng.sample(range(KINDS), KINDS)
    return episode(rng, split, [*kinds[:shots], rng.randrange(KINDS)])


def fewshot(rng: random.Random, split: Split) -> Episode:
    """For training: after the first kinds every picture is an example and a question at once."""
    kinds = rng.sample(range(KINDS), KINDS)
    shots = rng.choice((1, 2, 4, 4))
    queries = rng.randint(1, MAX_TRAINED_PICTURES - shots)
    return episode(rng, split, kinds[:shots] + [rng.choice(kinds[:shots]) for _ in range(queries)])
