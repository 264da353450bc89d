"""Conversations that activations are measured on: of one's own, or drawn and taken from what Python brings along."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
MEDIA_KEYS = ("image", "video", "path")
SIDE, CLIP_FRAMES = 448, 8
PASSAGE_CHARACTERS = 2400
DESCRIBE = {"image": "Describe the picture.", "video": "What happens in the video?"}

Chat = list[dict[str, Any]]
Source = str | Path | Sequence[Chat] | None


def calibration_chats(source: Source, samples: int, media_share: float = 0.75, seed: int = 0) -> list[Chat]:
    """`samples` conversations, shuffled by the seed.

    Args:
        source: a jsonl file of `{"messages": [...]}` or `{"text": ...}` rows, a folder of pictures, videos, texts
            and jsonl files, or the messages of conversations; None for pictures and clips that are drawn, and
            English prose.
        media_share: share of conversations with pictures or videos, as far as there are enough of both kinds.

    Raises:
        FileNotFoundError, ValueError: if the source is not there, holds nothing, or a row cannot be read.
    """
    rng = random.Random(seed)
    if source is None:
        media = round(samples * media_share)
        chats = [drawn_chat(rng) for _ in range(media)] + [prose_chat(rng) for _ in range(samples - media)]
        rng.shuffle(chats)
        return chats
    if not isinstance(source, (str, Path)):
        chats = list(source)
    elif not Path(source).exists():
        raise FileNotFoundError(f"no calibration data at {source}")
    else:
        chats = list(read_jsonl(Path(source)) if Path(source).is_file() else read_folder(Path(source)))
    if not chats:
        name = source if isinstance(source, (str, Path)) else "the calibration"
        raise ValueError(f"{name} holds no conversations, texts, pictures or videos to calibrate with")
    return mix(chats, samples, media_share, rng)


def name_of(source: Source) -> str:
    """The same text for the same source; conversations are told from each other by what they hold."""
    if source is None or isinstance(source, (str, Path)):
        return str(source)
    digest = hashlib.sha256()
    for chat in source:
        digest.update(json.dumps(chat, sort_keys=True, default=content_of).encode())
    return f"conversations {digest.hexdigest()}"


def content_of(value: Any) -> str:
    """Of pictures and arrays that messages hold."""
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else str(value)


def mix(chats: list[Chat], samples: int, media_share: float, rng: random.Random) -> list[Chat]:
    """At most `samples` of them, so many of each kind as the share says where there are enough."""
    rng.shuffle(chats)
    with_media = [chat for chat in chats if has_media(chat)]
    without = [chat for chat in chats if not has_media(chat)]
    wanted = round(samples * media_share)
    wanted = max(wanted, samples - len(without))
    picked = with_media[:wanted]
    picked += without[: samples - len(picked)]
    rng.shuffle(picked)
    return picked


def has_media(chat: Chat) -> bool:
    return any(block.get("type") != "text" for message in chat for block in blocks_of(message))


def blocks_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def read_jsonl(path: Path) -> Iterator[Chat]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield text_chat(row["text"])
        elif isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]:
            yield [with_paths(message, path.parent) for message in row["messages"]]
        else:
            raise ValueError(f'line {number} of {path} has neither "messages" nor "text"')


def with_paths(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths of media are meant from the file that names them."""
    blocks = [dict(block) for block in blocks_of(message)]
    for block in blocks:
        for key in MEDIA_KEYS:
            value = block.get(key)
            if isinstance(value, str) and "://" not in value and (folder / value).exists():
                block[key] = str(folder / value)
    return {**message, "content": blocks}


def read_folder(folder: Path) -> Iterator[Chat]:
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix in PICTURES:
            yield media_chat({"type": "image", "path": str(path)})
        elif suffix in VIDEOS:
            yield media_chat({"type": "video", "path": str(path)})
        elif suffix == ".jsonl":
            yield from read_jsonl(path)
        elif suffix in (".txt", ".md"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield from (text_chat(text[i : i + PASSAGE_CHARACTERS]) for i in range(0, len(text), PASSAGE_CHARACTERS))


def media_chat(block: dict[str, Any], answer: str | None = None) -> Chat:
    chat: Chat = [{"role": "user", "content": [block, {"type": "text", "text": DESCRIBE[block["type"]]}]}]
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return chat


def text_chat(text: str) -> Chat:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def prose_chat(rng: random.Random) -> Chat:
    """A passage of Python's language reference, which every Python brings along."""
    text = topics[rng.choice(sorted(topics))]
    start = rng.randrange(max(1, len(text) - PASSAGE_CHARACTERS))
    passage = text[start : start + PASSAGE_CHARACTERS]
    half = len(passage) // 2
    return [*text_chat(passage[:half]), {"role": "assistant", "content": [{"type": "text", "text": passage[half:]}]}]


def drawn_chat(rng: random.Random) -> Chat:
    """A drawing, a printed page, or a clip of something that moves, with a description."""
    kind = rng.choice(("shapes", "page", "clip"))
    if kind == "clip":
        frames, answer = draw_clip(rng)
        return media_chat({"type": "video", "video": frames}, answer)
    picture, answer = draw_shapes(rng) if kind == "shapes" else draw_page(rng)
    return media_chat({"type": "image", "image": picture}, answer)


def any_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def shaded(rng: random.Random) -> Image.Image:
    """A ground whose brightness changes from one side to the other."""
    gradient = Image.linear_gradient("L").resize((SIDE, SIDE)).rotate(rng.choice((0, 90, 180, 270)))
    picture = Image.new("RGB", (SIDE, SIDE), any_colour(rng))
    picture.paste(Image.new("RGB", (SIDE, SIDE), any_colour(rng)), mask=gradient)
    return picture


def draw_shapes(rng: random.Random) -> tuple[Image.Image, str]:
    picture = shaded(rng)
    pen, count = ImageDraw.Draw(picture), rng.randint(3, 12)
    for _ in range(count):
        x, y, size = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(20, 120)
        box = (x - size, y - size * 0.7, x + size, y + size * 0.7)
        rng.choice((pen.ellipse, pen.rectangle))(box, fill=any_colour(rng))
    return picture, f"The picture shows {count} shapes in different colours in front of a ground that gets darker."


def draw_page(rng: random.Random) -> tuple[Image.Image, str]:
    words = topics[rng.choice(sorted(topics))].split()
    start = rng.randrange(max(1, len(words) - 60))
    picture, text = Image.new("RGB", (SIDE, SIDE), "white"), words[start : start + 60]
    lines = [" ".join(text[i : i + 6]) for i in range(0, len(text), 6)]
    pen = ImageDraw.Draw(picture)
    pen.multiline_text((12, 12), "\n".join(lines), fill="black", font=ImageFont.load_default(rng.randint(14, 22)))
    return picture, "The page says: " + " ".join(text)


def draw_clip(rng: random.Random) -> tuple[list[Image.Image], str]:
    ground, colour, size = shaded(rng), any_colour(rng), rng.uniform(30, 80)
    (x, y), (to_x, to_y) = [(rng.uniform(0, SIDE), rng.uniform(0, SIDE)) for _ in range(2)]
    frames = []
    for number in range(CLIP_FRAMES):
        share, frame = number / (CLIP_FRAMES - 1), ground.copy()
        at_x, at_y = x + (to_x - x) * share, y + (to_y - y) * share
        ImageDraw.Draw(frame).ellipse((at_x - size, at_y - size, at_x + size, at_y + size), fill=colour)
        frames.append(frame)
    ways = f"{'right' if to_x > x else 'left'} and {'down' if to_y > y else 'up'}"
    return frames, f"A ball moves to the {ways} across the picture."
