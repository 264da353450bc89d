"""Draws pictures and a clip, asks vila-nano about them, judges its answers: `python examples/nano/demo.py`.

With a picture (`python examples/nano/demo.py photo.jpg`) it says what it sees there; of photographs it knows nothing.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from episodes import Block, Message, image_block, text_block
from judge import episode_of, is_right
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor, TextStreamer

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "checkpoints" / "vila-nano"
DRAWINGS = REPOSITORY / "demo-drawings"
TASKS = ("naming", "count", "read", "compare", "receipt_steps", "fewshot_4", "direction", "order")
SPLIT = "test"  # nothing of it was trained on
TERMINAL_COLUMNS, FRAME_MS = 40, 150
MAX_NEW_TOKENS = 96


class Answer(TextStreamer):
    """Writes an answer to stdout while it is made, and keeps it."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        sys.stdout.write(text)
        sys.stdout.flush()


def ask(model: Any, processor: Any, messages: list[Message]) -> str:
    """Streams the answer to stdout and returns it."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    streamer = Answer(processor.tokenizer)
    model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, streamer=streamer)
    return streamer.text


def save(media: list[Block], name: str) -> Path:
    """A clip as an animation, pictures beside each other."""
    DRAWINGS.mkdir(exist_ok=True)
    if media[0]["type"] == "video":
        frames, path = media[0]["video"], DRAWINGS / f"{name}.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
        return path
    path = DRAWINGS / f"{name}.png"
    beside([block["image"] for block in media]).save(path)
    return path


def beside(pictures: list[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures in a row."""
    width = sum(picture.width + gap for picture in pictures) - gap
    row, x = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white"), 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + gap
    return row


def show(media: list[Block]) -> None:
    """Draws pictures into a terminal, two pixels per character; of a clip the first, a middle and the last frame."""
    if media[0]["type"] == "video":
        frames = media[0]["video"]
        pictures = [frames[0], frames[len(frames) // 2], frames[-1]]
    else:
        pictures = [block["image"] for block in media]
    row = beside(pictures)
    row = ImageOps.contain(row, (TERMINAL_COLUMNS * len(pictures), TERMINAL_COLUMNS * len(pictures)))
    pixels = row.load()
    assert pixels is not None
    for y in range(0, row.height - 1, 2):
        line = "".join(
            "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*pixels[x, y], *pixels[x, y + 1])  # type: ignore[misc]
            for x in range(row.width)
        )
        sys.stdout.write(f"{line}\x1b[0m\n")


def present(media: list[Block], name: str) -> None:
    sys.stdout.write(f"\n{save(media, name).relative_to(REPOSITORY)}\n")
    if sys.stdout.isatty():
        show(media)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.split("\n")[0])
    parser.add_argument("picture", nargs="?", help="a picture to describe instead")
    parser.add_argument("--question", default="Describe the picture.", help="about it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    options = parser.parse_args(arguments)
    model = AutoModel.from_pretrained(CHECKPOINT, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
    if options.picture:
        content = [image_block(options.picture), text_block(options.question)]
        ask(model, processor, [{"role": "user", "content": content}])
        sys.stdout.write("\n")
        return
    right = 0
    for task in TASKS:
        episode = episode_of(task, SPLIT, options.seed, 0)
        present([block for blocks in episode.media for block in blocks], task)
        for turn in episode.turns[:-1]:
            sys.stdout.write(f"  {turn.question} {turn.answer}\n")
        sys.stdout.write(f"  {episode.target.question} ")
        is_correct = is_right(episode, ask(model, processor, episode.prompt))
        verdict = "right" if is_correct else f"wrong, it is: {episode.target.answer}"
        sys.stdout.write(f"  ({verdict})\n")
        right += is_correct
    sys.stdout.write(f"\n{right} of {len(TASKS)} answers are right.\n")


if __name__ == "__main__":
    main(sys.argv[1:])
