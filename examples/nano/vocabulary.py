"""What is drawn and asked about, and which of it is never trained on.

- A text (a printed string, a name, a sum) belongs to one split by its digest, so that the splits cannot overlap.
- Some pairs of colour and shape are shown in the test only.
"""

import hashlib
import random
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

COLOURS = {
    "red": (214, 38, 38),
    "green": (38, 150, 60),
    "blue": (40, 74, 220),
    "yellow": (238, 200, 20),
    "purple": (138, 48, 168),
    "orange": (245, 128, 20),
    "black": (24, 24, 24),
    "cyan": (50, 196, 212),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "square"),
        ("green", "star"),
        ("blue", "triangle"),
        ("yellow", "ring"),
        ("purple", "circle"),
        ("orange", "cross"),
        ("black", "circle"),
        ("cyan", "square"),
    }
)
TRAINED_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS)
GOODS = (
    *("tea", "milk", "rice", "soap", "bread", "juice", "eggs", "salt", "apple", "cake", "fish", "corn"),
    *("beans", "honey", "pasta", "sugar", "lemon", "nuts", "oil", "jam", "soup", "plum", "candy", "flour"),
)
MAX_PRICE = 19

BUCKETS = 8
CONSONANTS, VOWELS, LETTERS = "BCDFGHJKLMNPRSTVWXZ", "AEIOU", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_LETTERS = 6
LEXICON_SIZE, LEXICON_SEED = 600, "lexicon"


def split_of(text: str) -> Split:
    """The one split that may use a text: an eighth of all texts is for the test, an eighth for validation."""
    bucket = hashlib.blake2b(text.encode()).digest()[0] % BUCKETS
    return {0: "test", 1: "validation"}.get(bucket, "train")  # type: ignore[return-value]


def random_word(rng: random.Random) -> str:
    """3 to `MAX_LETTERS` capitals, half of the time pronounceable."""
    length = rng.randint(3, MAX_LETTERS)
    if rng.random() < 0.5:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    start = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (start + i) % 2 else CONSONANTS) for i in range(length))


def random_number(rng: random.Random) -> str:
    """2 to 4 digits, the first not 0."""
    digits = rng.randint(2, 4)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def random_string(rng: random.Random) -> str:
    return random_word(rng) if rng.random() < 0.6 else random_number(rng)


def make_lexicon() -> tuple[str, ...]:
    """The strings that the test prints: different, and none of them ever trained on."""
    rng, found = random.Random(LEXICON_SEED), dict[str, None]()
    while len(found) < LEXICON_SIZE:
        text = random_string(rng)
        if split_of(text) == "test":
            found[text] = None
    return tuple(found)


LEXICON = make_lexicon()


def draw_string(rng: random.Random, split: Split) -> str:
    """A string to print: of the lexicon in the test, else any of the split's."""
    if split == "test":
        return rng.choice(LEXICON)
    while split_of(text := random_string(rng)) != split:
        pass
    return text


def draw_names(rng: random.Random, split: Split, count: int) -> list[str]:
    """Different made-up names of three letters (consonant, vowel, consonant)."""
    names = dict[str, None]()
    while len(names) < count:
        name = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
        if split_of(name) == split:
            names[name] = None
    return list(names)


def draw_pair(rng: random.Random, split: Split) -> tuple[str, str]:
    """`(colour, shape)`; in the test half of them are pairs that were never trained on."""
    pairs = sorted(HELD_OUT_PAIRS) if split == "test" and rng.random() < 0.5 else TRAINED_PAIRS
    return rng.choice(pairs)
