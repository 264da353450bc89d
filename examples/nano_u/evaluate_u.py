"""Scores a VILA-U on drawn scenes: `python examples/nano_u/evaluate_u.py [--model DIR]`.

- drawing: share of its pictures that show what was asked for, by `drawn_judge`, for several guidance scales;
- unseen: the same at the best scale, where half of the things are pairs of colour and shape never trained on;
- reconstruction: PSNR on the pixels of things, by how many codes of every position are decoded;
- understanding: its answers about those of its own pictures that are right.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

import torch
from codes_training import quality
from drawn_judge import is_right
from drawn_scenes import DESCRIBED, RELATIONS, SIDE, Scene, draw_scene, questions
from episodes import image_block, text_block
from judge import check_words, wilson
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor
from vocabulary import Split

DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "checkpoints" / "vila-u-nano"
SAMPLES, BATCH_SIZE = 200, 50
SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
ZOOM, COLUMNS, CAPTION = 2, 6, 14


def scenes(count: int, seed: int, split: Split, relations: tuple[str, ...] = tuple(RELATIONS)) -> list[Scene]:
    """Scenes to ask for; those of the split `test` have pairs that were never trained on."""
    return [draw_scene(random.Random(f"draw/{seed}/{index}"), split, relations) for index in range(count)]


@torch.no_grad()
def draw(model: Any, processor: Any, asked: list[Scene], scale: float, seed: int, progress: Any) -> list[Image.Image]:
    """A picture of each scene; the same for the same seed."""
    generator, pictures = torch.Generator(model.device).manual_seed(seed), list[Image.Image]()
    for start in range(0, len(asked), BATCH_SIZE):
        texts = [scene.text for scene in asked[start : start + BATCH_SIZE]]
        inputs = processor(text=texts, generation_mode="image", return_tensors="pt").to(model.device)
        output = model.generate(**inputs, generation_mode="image", guidance_scale=scale, generator=generator)
        pictures += processor.post_process_multimodal_output(output.pixel_values, generation_mode="image")
        progress.update(len(texts))
    return pictures


@torch.no_grad()
def understand(model: Any, processor: Any, shown: list[tuple[Scene, Image.Image]], seed: int) -> tuple[int, int]:
    """Right answers and questions, every question in a chat of its own."""
    rng, chats, expected = random.Random(f"ask/{seed}"), [], []
    for scene, picture in shown:
        for question, text in questions(rng, scene):
            chats.append([{"role": "user", "content": [image_block(picture), text_block(question)]}])
            expected.append(text)
    right = 0
    for start in range(0, len(chats), BATCH_SIZE):
        inputs = processor.apply_chat_template(
            chats[start : start + BATCH_SIZE],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**inputs, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(map(check_words, answers, expected[start : start + BATCH_SIZE]))
    return right, len(chats)


def contact_sheet(asked: list[Scene], pictures: list[Image.Image]) -> Image.Image:
    """Pictures with the texts that asked for them."""
    side = SIDE * ZOOM
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * side, rows * (side + 2 * CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (scene, picture) in enumerate(zip(asked, pictures)):
        x, y = number % COLUMNS * side, number // COLUMNS * (side + 2 * CAPTION)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        text = scene.text.replace(f" {scene.relation} ", f"\n{scene.relation} ")
        pen.multiline_text((x + 2, y + side), text, fill="black", spacing=0, font_size=10)
    return sheet


def percent(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['score']:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def table_of(report: dict[str, Any]) -> str:
    """Markdown of what `evaluate` found."""
    scales, depths = list(report["drawing"]), report["reconstruction"]
    lines = [
        "| guidance | " + " | ".join(f"{float(scale):g}" for scale in scales) + " |",
        "|---" * (len(scales) + 1) + "|",
    ]
    lines.append("| pictures that are right | " + " | ".join(percent(report["drawing"][s]) for s in scales) + " |")
    lines += ["", "| | |", "|---|---|"]
    title = f"pictures that are right at {report['best']:g}, half of the things of unseen pairs"
    lines.append(f"| {title} | {percent(report['unseen'])} |")
    if report["understanding"]:
        asked = report["understanding"]["questions"]
        lines.append(f"| {asked} questions about its own right pictures | {percent(report['understanding'])} |")
    return "\n".join([*lines, *(f"| reconstruction, {name} | {value:.1f} dB |" for name, value in depths.items())])


def row(right: int, total: int) -> dict[str, Any]:
    return {"score": right / total, "interval": wilson(right, total), "questions": total}


def evaluate(model: Any, processor: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All scores; the contact sheet is written by the way."""
    seed, drawing = options.seed, dict[float, Any]()
    with tqdm(total=options.samples * (len(options.scales) + 2), unit="picture") as progress:

        def drawn(asked: list[Scene], scale: float) -> tuple[list[Image.Image], list[bool]]:
            pictures = draw(model, processor, asked, scale, seed, progress)
            return pictures, list(map(is_right, asked, pictures))

        for scale in options.scales:
            right = drawn(scenes(options.samples, seed, "validation"), scale)[1]
            drawing[scale] = row(sum(right), len(right))
        best = max(options.scales, key=lambda scale: drawing[scale]["score"])
        unseen = drawn(scenes(options.samples, seed, "test"), best)[1]
        described = scenes(options.samples, seed + 1, "validation", DESCRIBED)
        pictures, right = drawn(described, best)
    shown = [pair for pair, ok in zip(zip(described, pictures), right) if ok]
    if options.sheet:
        contact_sheet(described[: 4 * COLUMNS], pictures[: 4 * COLUMNS]).save(options.sheet)
    return {
        "drawing": drawing,
        "best": best,
        "unseen": row(sum(unseen), len(unseen)),
        "understanding": row(*understand(model, processor, shown, seed)) if shown else None,
        "reconstruction": quality(model.model),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="evaluate_u.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and draws (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="pictures per scale (default: %(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of guidance (default: 1 to 6)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument("--sheet", type=Path, help="a picture of the first drawings goes here")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error("--samples must be at least 1")
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=options.dtype).eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    sys.stdout.write(json.dumps(evaluate(model, processor, options), indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate_u.py: {error}")
