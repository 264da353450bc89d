"""Draws the example chats of the demo page anew: `python examples/chats/draw.py` writes `chats.jsonl` and its media.

Every line is a chat in the form that fine-tuning takes, ending with the question that is to be asked; what it knows
before, pictures with their answers, is the few-shot part.
"""

import json
import sys
from pathlib import Path
from typing import Any

import av

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent / "nano"))

from episodes import Message  # noqa: E402
from judge import episode_of  # noqa: E402
from PIL import Image  # noqa: E402

# title -> task of examples/nano, and the seed of one whose answer a person sees at a glance
CHATS = {
    "Name a thing": ("naming", 3),
    "Compare two pictures": ("compare", 0),
    "Add up a receipt": ("receipt_steps", 2),
    "Watch a clip": ("direction", 0),
    "Learn names from four pictures": ("fewshot_4", 1),
}
FRAME_RATE = 6
SPLIT = "test"  # nothing of it was trained on


def save(block: dict[str, Any], name: str) -> dict[str, Any]:
    """The block with a file in place of a drawn picture or clip."""
    if block["type"] == "image":
        path = f"{name}.jpg"
        block["image"].save(FOLDER / path, quality=95)
    else:
        path = f"{name}.mp4"
        save_clip(block["video"], FOLDER / path)
    return {"type": block["type"], "path": path}


def save_clip(frames: list[Image.Image], path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def main() -> None:
    with open(FOLDER / "chats.jsonl", "w", encoding="utf-8") as file:
        for title, (task, seed) in CHATS.items():
            chat: list[Message] = episode_of(task, SPLIT, seed, 0).prompt
            names = (f"{task}_{number}" for number in range(100))
            for message in chat:
                message["content"] = [
                    block if block["type"] == "text" else save(block, next(names)) for block in message["content"]
                ]
            file.write(json.dumps({"title": title, "messages": chat}) + "\n")


if __name__ == "__main__":
    main()
