"""Converts a tiny original checkpoint and asks it about a picture: `python examples/demo.py [PICTURE]`.

The checkpoint has random weights, so the answer is noise; a real one takes its place without another line changing.
"""

import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor
from vila.conversion_vila import convert

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKPOINT = REPOSITORY / "tests" / "goldens" / "vila" / "nvila_lite_image" / "checkpoint"
CONVERTED = REPOSITORY / "demo-model"


def draw_picture() -> Image.Image:
    """A house under a sun."""
    picture = Image.new("RGB", (480, 320), "skyblue")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 220, 480, 320), fill="green")
    pen.rectangle((150, 140, 300, 260), fill="firebrick")
    pen.polygon(((130, 140), (225, 60), (320, 140)), fill="saddlebrown")
    pen.ellipse((380, 30, 440, 90), fill="gold")
    return picture


def main() -> None:
    image = Image.open(sys.argv[1]) if len(sys.argv) > 1 else draw_picture()
    shutil.rmtree(CONVERTED, ignore_errors=True)
    path = convert(CHECKPOINT, CONVERTED)

    model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype="auto")
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Please describe the image."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=32)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    tiles, tokens = len(inputs["pixel_values"]), inputs["input_ids"].shape[1]
    sys.stdout.write(f"{image.width}x{image.height} picture, {tiles} tiles, {tokens} prompt tokens\n")
    sys.stdout.write(f"Answer of the untrained checkpoint: {answer!r}\n")


if __name__ == "__main__":
    main()
