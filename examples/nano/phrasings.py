"""How questions are asked: for every kind the trained phrasings, and those that only the test uses.

The words of a held-out phrasing all stand in trained ones; their combination is new.
"""

import random

from vocabulary import Split

TRAINED: dict[str, tuple[str, ...]] = {
    "name": (
        "What is in the picture?",
        "What do you see?",
        "Name the thing in the picture.",
        "Which thing is this?",
        "Tell me what is shown here.",
        "What is shown?",
    ),
    "colour": (
        "What colour is the {shape}?",
        "Which colour does the {shape} have?",
        "Name the colour of the {shape}.",
        "Tell me which colour the {shape} is.",
        "The {shape} has which colour?",
        "What is the colour of the {shape} in the picture?",
    ),
    "shape": (
        "What shape is the {colour} thing?",
        "Which shape does the {colour} thing have?",
        "Name the shape of the {colour} thing.",
        "Tell me which shape the {colour} thing is.",
        "The {colour} thing has which shape?",
        "What is the shape of the {colour} thing in the picture?",
    ),
    "presence": (
        "Is there a {thing}?",
        "Is there a {thing} in the picture?",
        "Do you see a {thing}?",
        "Does the picture show a {thing}?",
        "Can you see a {thing} here?",
        "Is a {thing} in the picture?",
    ),
    "position": (
        "Is the {first} {relation} the {second}?",
        "Does the picture show the {first} {relation} the {second}?",
        "Do you see the {first} {relation} the {second}?",
        "In the picture, is the {first} {relation} the {second}?",
        "Can you see the {first} {relation} the {second}?",
    ),
    "count": (
        "How many {things} are there?",
        "How many {things} do you see?",
        "Count the {things}.",
        "What is the number of {things}?",
        "Tell me how many {things} are in the picture.",
        "How many {things} does the picture show?",
    ),
    "read": (
        "What does it say?",
        "Read the text.",
        "What is written here?",
        "What is printed in the picture?",
        "Which text do you see?",
        "Tell me what is written in the picture.",
    ),
    "more": (
        "Which picture has more {things}, the first or the second?",
        "Which picture shows more {things}?",
        "Where are more {things}, in the first or the second picture?",
        "Are there more {things} in the first or the second picture?",
        "Tell me which picture has more {things}.",
    ),
    "which": (
        "Which picture has a {thing}, the first or the second?",
        "Which picture shows a {thing}?",
        "Where is a {thing}, in the first or the second picture?",
        "Is a {thing} in the first or the second picture?",
        "Tell me which picture has a {thing}.",
    ),
    "direction": (
        "Does the {thing} move {one} or {other}?",
        "Which way does the {thing} move, {one} or {other}?",
        "Where does the {thing} go, {one} or {other}?",
        "Tell me if the {thing} moves {one} or {other}.",
    ),
    "order": (
        "Which comes first, the {one} or the {other}?",
        "What do you see first, the {one} or the {other}?",
        "Tell me which comes first, the {one} or the {other}.",
        "Does the {one} or the {other} come first?",
    ),
    "flashes": (
        "How many times does the lamp flash?",
        "How many flashes do you see?",
        "Count the flashes.",
        "Tell me how many times the lamp flashes.",
        "What is the number of flashes?",
    ),
    "steps": (
        "What is the total? Write the steps.",
        "Add the prices step by step.",
        "Tell me the total with all steps.",
        "How much is it in total? Go step by step.",
    ),
    "total": (
        "What is the total?",
        "What is the total? Only the number.",
        "Tell me the total.",
        "How much is it in total?",
    ),
    "price": ("How much is the {goods}?", "What is the price of the {goods}?", "Tell me the price of the {goods}."),
    "tallest": (
        "Which bar is the tallest?",
        "Which colour does the tallest bar have?",
        "What colour is the tallest bar?",
        "Name the colour of the tallest bar.",
    ),
    "smallest": (
        "Which bar is the smallest?",
        "Which colour does the smallest bar have?",
        "What colour is the smallest bar?",
        "Name the colour of the smallest bar.",
    ),
    "names": (
        "The names are {names}. What is this?",
        "Names: {names}. Which name does this have?",
        "The names are {names}. Name this.",
    ),
    "again": ("And this?", "What is this?", "Which name does this have?", "Name this."),
    "sum": ("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} + {b}?", "Tell me the total of {a} and {b}."),
    "larger": ("Which is more, {a} or {b}?", "Tell me which is more, {a} or {b}.", "Is {a} or {b} more?"),
    "copy": ("Write {text}.", "Write the text {text}.", "Say {text}."),
    "after": ("What comes after {item}?", "Tell me what comes after {item}.", "Which comes after {item}?"),
    "opposite": ("What is the opposite of {item}?", "Name the opposite of {item}.", "The opposite of {item}?"),
    "lookup": ("{facts} What is {key}?", "{facts} Tell me the number of {key}.", "{facts} How much is {key}?"),
    "describe": ("Describe the picture.", "What is in the picture? Name all.", "Tell me all you see."),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "name": ("Tell me which thing is in the picture.", "Name what you see here."),
    "colour": ("Tell me the colour of the {shape}.", "In the picture, which colour is the {shape}?"),
    "shape": ("Tell me the shape of the {colour} thing.", "In the picture, which shape is the {colour} thing?"),
    "presence": ("Can you see a {thing} in the picture?", "Tell me, is there a {thing} here?"),
    "position": ("Tell me, is the {first} {relation} the {second}?", "Is the {first} here {relation} the {second}?"),
    "count": ("How many {things} can you see?", "Tell me the number of {things} in the picture."),
    "read": ("Read what is printed here.", "Which text is written in the picture?"),
    "more": ("Does the first or the second picture show more {things}?", "Where do you see more {things}?"),
    "which": ("Does the first or the second picture show a {thing}?", "Where do you see a {thing}?"),
    "direction": (
        "Tell me which way the {thing} moves, {one} or {other}.",
        "Where does the {thing} move, {one} or {other}?",
    ),
    "order": ("Which do you see first, the {one} or the {other}?", "Tell me what is first, the {one} or the {other}."),
    "flashes": ("How many times do you see the lamp flash?", "Tell me the number of flashes."),
    "steps": ("Tell me how much it is in total, step by step.", "Write the total with all steps."),
    "total": ("Tell me how much it is in total.", "How much is the total?"),
    "tallest": ("Tell me the colour of the tallest bar.", "The tallest bar has which colour?"),
    "smallest": ("Tell me the colour of the smallest bar.", "The smallest bar has which colour?"),
    "names": ("The names are {names}. Tell me what this is.",),
    "again": ("Tell me what this is.",),
    "sum": ("Tell me how much {a} + {b} is.", "What is the total of {a} and {b}?"),
    "larger": ("What is more, {a} or {b}?",),
    "copy": ("Say the text {text}.",),
    "after": ("Name what comes after {item}.",),
    "opposite": ("Tell me the opposite of {item}.",),
    "lookup": ("{facts} Tell me how much {key} is.", "{facts} What is the number of {key}?"),
}


def ask(rng: random.Random, split: Split, kind: str, **fields: object) -> str:
    """A question of a kind; in the test half of them in a phrasing that was never trained on."""
    held_out = split == "test" and kind in HELD_OUT and rng.random() < 0.5
    return rng.choice((HELD_OUT if held_out else TRAINED)[kind]).format(**fields)


def is_held_out(kind: str, question: str, **fields: object) -> bool:
    """Whether the question is in a phrasing of that kind that only the test uses."""
    return question in [phrasing.format(**fields) for phrasing in HELD_OUT.get(kind, ())]
