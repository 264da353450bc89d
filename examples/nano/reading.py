"""Tasks about printed text: a word or number, small text that only tiles show, receipts, bar charts."""

import random
from functools import lru_cache

from drawing import (
    SCALE,
    SIDE,
    add_clutter,
    add_noise,
    any_font,
    blank,
    draw_text,
    ink,
    jitter,
    random_letters,
    text_size,
)
from episodes import Episode, Turn, image_block
from fonts import PILLOW_FONT, font
from phrasings import ask, is_held_out
from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont
from vocabulary import COLOURS, GOODS, MAX_PRICE, Split, draw_string, split_of

Area = tuple[int, int, int, int]

MIN_ITEMS, MAX_ITEMS = 3, 5
BANNER_TILES = 4  # side by side
RECEIPT_FONTS = ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", PILLOW_FONT)
STRIPES = (150, 150, 158)


def held_out(kind: str, question: str, *new: str) -> tuple[str, ...]:
    return new + (("phrasing",) if is_held_out(kind, question) else ())


def read_turn(rng: random.Random, split: Split, text: str) -> Turn:
    question = ask(rng, split, "read")
    return Turn(question, text, "words", 0.0, held_out("read", question, *(("string",) if split == "test" else ())))


def read(rng: random.Random, split: Split) -> Episode:
    """One string in a picture of one tile."""
    text = draw_string(rng, split)
    picture = blank(rng, SIDE, SIDE, SCALE)
    add_clutter(rng, ImageDraw.Draw(picture), SIDE, SIDE)
    picture = picture.reduce(SCALE)
    face = any_font(rng, 15, 26)
    while text_size(text, face)[0] > SIDE - 6:
        face = any_font(rng, 14, 22)
    write_anywhere(rng, ImageDraw.Draw(picture), text, face, (0, 0, SIDE, SIDE))
    return Episode("read", (read_turn(rng, split, text),), ((image_block(add_noise(rng, picture)),),))


def write_anywhere(rng: random.Random, pen: ImageDraw.ImageDraw, text: str, face: FreeTypeFont, area: Area) -> None:
    """Writes a text at a random place of `area`, `(left, upper, right, lower)` in pixels, sometimes underlined."""
    width, height = text_size(text, face)
    x = rng.uniform(area[0] + 2, max(area[0] + 2, area[2] - width - 2))
    y = rng.uniform(area[1] + 2, max(area[1] + 2, area[3] - height - 5))
    colour = ink(rng)
    draw_text(pen, (x, y), text, face, colour)
    if rng.random() < 0.15:
        pen.line((x, y + height + 2, x + width, y + height + 2), fill=colour)


def transcribe(rng: random.Random, split: Split) -> Episode:
    """Two to four short strings below each other, all to be read: many letters for one pass of the tower."""
    lines = rng.randint(2, 4)
    picture = blank(rng)
    pen, texts, step = ImageDraw.Draw(picture), [], SIDE // lines
    for line in range(lines):
        text, face = draw_string(rng, split), any_font(rng, 13, 20)
        while text_size(text, face)[0] > SIDE - 6:
            face = any_font(rng, 12, 18)
        write_anywhere(rng, pen, text, face, (0, line * step, SIDE, (line + 1) * step))
        texts.append(text)
    turn = Turn(ask(rng, "train", "read"), " ".join(texts))
    return Episode("transcribe", (turn,), ((image_block(add_noise(rng, picture)),),))


def tiles(rng: random.Random, split: Split) -> Episode:
    """A string in a long banner: squeezed into one tile, its letters are two pixels wide."""
    text, width = draw_string(rng, split), SIDE * BANNER_TILES
    picture = blank(rng, width, SIDE)
    pen = ImageDraw.Draw(picture)
    add_clutter(rng, pen, width, SIDE, 1)
    tile = rng.randrange(BANNER_TILES)
    write_anywhere(rng, pen, text, any_font(rng, 12, 13), (tile * SIDE, 0, (tile + 1) * SIDE, SIDE))
    for other in rng.sample([number for number in range(BANNER_TILES) if number != tile], rng.randint(1, 2)):
        x, y = other * SIDE + rng.randint(4, 60), rng.randint(4, 60)
        pen.rectangle((x, y, x + rng.randint(10, 44), y + rng.randint(3, 30)), fill=jitter(rng, STRIPES))
    return Episode("tiles", (read_turn(rng, split, text),), ((image_block(add_noise(rng, picture)),),))


def draw_items(rng: random.Random, split: Split) -> list[tuple[str, int]]:
    """Goods and prices of a receipt of one's own split."""
    while True:
        goods = rng.sample(GOODS, rng.randint(MIN_ITEMS, MAX_ITEMS))
        items = [(name, rng.randint(1, MAX_PRICE)) for name in goods]
        if split_of(repr(sorted(items))) == split:
            return items


def written_steps(items: list[tuple[str, int]]) -> str:
    """The running total after every item, and the total: `tea 4 = 4, milk 12 = 16. Total 16`."""
    total, steps = 0, []
    for name, price in items:
        total += price
        steps.append(f"{name} {price} = {total}")
    return f"{', '.join(steps)}. Total {total}"


def draw_receipt(rng: random.Random, items: list[tuple[str, int]]) -> Image.Image:
    """A slip of one tile's width and two tiles' height: a shop's name, goods on the left, prices on the right."""
    width, height = SIDE, SIDE * 2
    picture = blank(rng, width, height)
    pen, colour = ImageDraw.Draw(picture), ink(rng)
    add_clutter(rng, pen, width, height, 1)
    face = font(rng.choice(RECEIPT_FONTS), rng.randint(14, 16))
    y = rng.uniform(4, 16)
    draw_text(pen, (rng.uniform(4, 30), y), random_letters(rng, 4), any_font(rng, 13, 15), colour)
    y += 20
    pen.line((4, y, width - 4, y), fill=jitter(rng, STRIPES))
    step = (height - y - 18) / len(items) * rng.uniform(0.75, 1)
    for number, (name, price) in enumerate(items):
        line = y + 6 + number * step
        draw_text(pen, (4 + rng.uniform(0, 3), line), name, face, colour)
        draw_text(
            pen, (width - 4 - text_size(str(price), face)[0] - rng.uniform(0, 3), line), str(price), face, colour
        )
    return add_noise(rng, picture, rng.choice((3, 7, 15)))


def receipt(rng: random.Random, split: Split, kind: str) -> Episode:
    """`kind` `"steps"` asks for the total with written steps, `"total"` for the number alone."""
    items = draw_items(rng, split)
    total = sum(price for _, price in items)
    question = ask(rng, split, kind)
    answer = written_steps(items) if kind == "steps" else str(total)
    turn = Turn(question, answer, "last_number", guessed_total_chance(), held_out(kind, question))
    turns = [turn]
    if split != "test":
        for name, price in rng.sample(items, rng.randint(0, 2)):
            turns.insert(0, Turn(ask(rng, split, "price", goods=name), str(price), "number", 1 / MAX_PRICE))
    return Episode(f"receipt_{kind}", tuple(turns), ((image_block(draw_receipt(rng, items)),),))


@lru_cache(maxsize=1)
def guessed_total_chance() -> float:
    """Probability of the likeliest total."""
    totals, shares = {0: 1.0}, dict[int, float]()
    for number in range(1, MAX_ITEMS + 1):
        grown: dict[int, float] = {}
        for total, share in totals.items():
            for price in range(1, MAX_PRICE + 1):
                grown[total + price] = grown.get(total + price, 0) + share / MAX_PRICE
        totals = grown
        if number >= MIN_ITEMS:
            for total, share in totals.items():
                shares[total] = shares.get(total, 0) + share / (MAX_ITEMS - MIN_ITEMS + 1)
    return max(shares.values())


def receipt_steps(rng: random.Random, split: Split) -> Episode:
    return receipt(rng, split, "steps")


def receipt_direct(rng: random.Random, split: Split) -> Episode:
    return receipt(rng, split, "total")


def chart(rng: random.Random, split: Split) -> Episode:
    """Three to five coloured bars; which is the tallest or the smallest."""
    colours = rng.sample(list(COLOURS), rng.randint(3, 5))
    heights = rng.sample(range(12, 89, 8), len(colours))
    picture = blank(rng, SIDE, SIDE, SCALE)
    pen = ImageDraw.Draw(picture)
    add_clutter(rng, pen, SIDE, SIDE)
    base, step = SIDE - 8, (SIDE - 12) / len(colours)
    pen.line((4 * SCALE, base * SCALE, (SIDE - 4) * SCALE, base * SCALE), fill=ink(rng), width=SCALE)
    for number, (colour, height) in enumerate(zip(colours, heights)):
        left = 6 + number * step + rng.uniform(0, step * 0.2)
        box = (left * SCALE, (base - height) * SCALE, (left + step * 0.65) * SCALE, base * SCALE)
        pen.rectangle(box, fill=jitter(rng, COLOURS[colour]))
    ranked = [colour for _, colour in sorted(zip(heights, colours))]
    turns = []
    for kind, answer in (("tallest", ranked[-1]), ("smallest", ranked[0])):
        question = ask(rng, split, kind)
        turns.append(Turn(question, answer, "words", 1 / len(COLOURS), held_out(kind, question)))
    rng.shuffle(turns)
    turns = turns[:1] if split == "test" else turns
    return Episode("chart", tuple(turns), ((image_block(add_noise(rng, picture.reduce(SCALE))),),))
