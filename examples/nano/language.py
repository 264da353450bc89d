"""Questions without pictures: sums, comparisons, copies, successors, opposites, look-ups."""

import random

from episodes import Episode, Turn
from phrasings import ask, is_held_out
from reading import draw_items, written_steps
from vocabulary import MAX_PRICE, Split, draw_names, draw_string, split_of

SERIES = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("spring", "summer", "autumn", "winter"),
)
OPPOSITES = (
    ("left", "right"),
    ("up", "down"),
    ("first", "last"),
    ("top", "bottom"),
    ("more", "less"),
    ("large", "small"),
    ("yes", "no"),
    ("black", "white"),
    ("day", "night"),
    ("open", "closed"),
)
MAX_SUM_PART = 79


def turn(rng: random.Random, split: Split, kind: str, answer: str, check: str, chance: float, **fields) -> Turn:
    question = ask(rng, split, kind, **fields)
    held_out = ("phrasing",) if is_held_out(kind, question, **fields) else ()
    return Turn(question, answer, check, chance, held_out)


def sum_turn(rng: random.Random, split: Split) -> Turn:
    """A running total and a price, as on a receipt."""
    while True:
        a, b = rng.randint(0, MAX_SUM_PART), rng.randint(1, MAX_PRICE)
        if split_of(f"{a} + {b}") == split:
            return turn(rng, split, "sum", str(a + b), "number", 0.02, a=a, b=b)


def larger_turn(rng: random.Random, split: Split) -> Turn:
    while True:
        a, b = rng.sample(range(100), 2)
        if split_of(f"{a} or {b}") == split:
            return turn(rng, split, "larger", str(max(a, b)), "number", 0.5, a=a, b=b)


def copy_turn(rng: random.Random, split: Split) -> Turn:
    text = draw_string(rng, split)
    return turn(rng, split, "copy", text, "words", 0.0, text=text)


def after_turn(rng: random.Random, split: Split) -> Turn:
    """Facts belong to all splits; only the test's phrasings are new."""
    series = rng.choice(SERIES)
    position = rng.randrange(len(series) - 1)
    return turn(rng, split, "after", series[position + 1], "words", 1 / len(series), item=series[position])


def opposite_turn(rng: random.Random, split: Split) -> Turn:
    pair = rng.sample(rng.choice(OPPOSITES), 2)
    return turn(rng, split, "opposite", pair[1], "words", 1 / (2 * len(OPPOSITES)), item=pair[0])


def lookup_turn(rng: random.Random, split: Split) -> Turn:
    """One of several stated facts: what learning in context needs."""
    names = draw_names(rng, split, rng.randint(2, 4))
    numbers = rng.sample(range(10), len(names))
    facts = " ".join(f"{name} is {number}." for name, number in zip(names, numbers))
    picked = rng.randrange(len(names))
    fields = {"facts": facts, "key": names[picked]}
    return turn(rng, split, "lookup", str(numbers[picked]), "number", 1 / len(names), **fields)


def receipt_turn(rng: random.Random, split: Split) -> Turn:
    """A receipt told in words, with the steps to its total."""
    items = draw_items(rng, split)
    told = ", ".join(f"{name} {price}" for name, price in items)
    return Turn(f"{told}. {ask(rng, split, 'steps')}", written_steps(items), "last_number", 0.03)


QUESTIONS = (sum_turn, larger_turn, copy_turn, after_turn, opposite_turn, lookup_turn)
TRAINED_QUESTIONS = (*QUESTIONS, sum_turn, receipt_turn)
TRAINED_CHARACTERS = 120


def text(rng: random.Random, split: Split) -> Episode:
    """One question in the test; in training several about different things, about equally long together."""
    if split == "test":
        return Episode("text", (rng.choice(QUESTIONS)(rng, split),))
    turns: list[Turn] = []
    while sum(len(turn.question) + len(turn.answer) for turn in turns) < TRAINED_CHARACTERS:
        turns.append(rng.choice(TRAINED_QUESTIONS)(rng, split))
    return Episode("text", tuple(turns))
