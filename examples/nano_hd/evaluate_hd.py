"""Scores a VILA-HD on codes in small print: `python examples/nano_hd/evaluate_hd.py --model DIR`.

The same questions three times: looking where the question leads (top-down), looking without the question (bottom-up),
and with the low-resolution view alone. `--sheet` draws what was looked at.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

import torch
from canvases import CELL, QUESTIONS, SIDE, Canvas, Spot, code_episode
from episodes import Episode, Turn, image_block
from judge import is_right, wilson
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "checkpoints" / "vila-hd-nano"
SAMPLES, BATCH_SIZE = 400, 8


@dataclass(frozen=True)
class Mode:
    """How to look: arguments of `generate()`, and bounds on the score, None where it is only reported."""

    options: dict[str, Any]
    goal: tuple[float, float] | None


MODES = {
    "top-down": Mode({"look_close_mode": "after_prompt"}, (0.85, 1.0)),
    "bottom-up": Mode({"look_close_mode": "after_image"}, None),
    "low resolution": Mode({"num_look_close": 0}, (0.0, 0.20)),
}
SHEET_ROWS, SHEET_SIDE, CAPTION, MARGIN = 3, 360, 34, 6

Drawn = tuple[Episode, Canvas, Spot]


def drawn_episodes(samples: int, seed: int = 0) -> Iterator[Drawn]:
    """Questions of the test split; the same numbers always give the same pixels and texts."""
    for index in range(samples):
        yield code_episode(random.Random(f"test/code/{seed}/{index}"), "test")


def prepare(processor: Any, episodes: list[Episode]) -> Any:
    return processor.apply_chat_template(
        [episode.prompt for episode in episodes],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def ask(model: Any, processor: Any, inputs: Any, mode: str) -> tuple[list[str], Any]:
    """Greedy answers to what `prepare` made, and for each large scale `(pictures, h, w)` what was looked at."""
    output = model.generate(
        **inputs.to(model.device),
        do_sample=False,
        return_dict_in_generate=True,
        output_selection_maps=True,
        **MODES[mode].options,
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answers, skip_special_tokens=True), output["selection_maps"]


def is_seen(maps: Any, number: int, spot: Spot) -> bool:
    """Whether all patches of a code were looked at."""
    if maps is None:
        return False
    chosen = maps[-1][number]
    patch = SIDE // chosen.shape[-1]
    left, upper, right, lower = spot.box
    return bool(chosen[upper // patch : -(-lower // patch), left // patch : -(-right // patch)].all())


@dataclass
class Score:
    """What was counted of one mode.

    Attributes:
        right: answers that are the code; seen: canvases on which all patches of the code were looked at.
        looked: sum of the shares of the patches that were looked at.
    """

    mode: str
    total: int = 0
    right: int = 0
    seen: int = 0
    looked: float = 0.0

    def add(self, drawn: Sequence[Drawn], answers: Sequence[str], maps: Any) -> None:
        for number, ((episode, _, spot), answer) in enumerate(zip(drawn, answers)):
            self.total += 1
            self.right += is_right(episode, answer)
            self.seen += is_seen(maps, number, spot)
            self.looked += 0.0 if maps is None else float(maps[-1][number].float().mean())

    def as_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "accuracy": self.right / self.total,
            "interval": wilson(self.right, self.total),
            "right": self.right,
            "total": self.total,
            "goal": MODES[self.mode].goal,
            "code_seen": self.seen / self.total,
            "patches": self.looked / self.total,
        }


def score(
    model: Any,
    processor: Any,
    modes: Sequence[str] = tuple(MODES),
    samples: int = SAMPLES,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> list[dict[str, Any]]:
    """Scores of the modes on the same questions."""
    scores, drawn = [Score(mode) for mode in modes], drawn_episodes(samples, seed)
    with tqdm(total=samples, unit="question", file=sys.stderr) as progress:
        while some := list(islice(drawn, batch_size)):
            inputs = prepare(processor, [episode for episode, _, _ in some])
            for own in scores:
                own.add(some, *ask(model, processor, inputs, own.mode))
            progress.update(len(some))
    return [own.as_dict() for own in scores]


def table_of(report: dict[str, Any]) -> str:
    """Markdown of the scores of a report, as `--json` writes it."""
    lines = ["| looks | score | 95 % interval | goal | code looked at | patches |", "|---|---|---|---|---|---|"]
    for row in report["scores"]:
        low, high = row["interval"]
        goal = "" if row["goal"] is None else f"{100 * row['goal'][0]:.0f} to {100 * row['goal'][1]:.0f} %"
        lines.append(
            f"| {row['mode']} | {100 * row['accuracy']:.1f} % | {100 * low:.1f} to {100 * high:.1f} % | {goal} | "
            f"{100 * row['code_seen']:.1f} % | {100 * row['patches']:.1f} % |"
        )
    return "\n".join(lines)


def sheet(model: Any, processor: Any, seed: int = 0, rows: int = SHEET_ROWS) -> Image.Image:
    """Two questions about each of some canvases and the answers: what was looked at, and the code from close by."""
    panels = []
    for index in range(rows):
        _, canvas, _ = code_episode(random.Random(f"test/code/{seed}/{index}"), "test")
        for spot in canvas.spots[:2]:
            panels.append(panel(model, processor, canvas, spot))
    width, height = panels[0].size
    drawn = Image.new("RGB", (2 * width + MARGIN, rows * (height + MARGIN)), "white")
    for number, own in enumerate(panels):
        drawn.paste(own, (number % 2 * (width + MARGIN), number // 2 * (height + MARGIN)))
    return drawn


def panel(model: Any, processor: Any, canvas: Canvas, spot: Spot) -> Image.Image:
    """One question, its answer, what was looked at, and the code from close by."""
    question = QUESTIONS[0].format(thing=spot.thing.name)
    episode = Episode("code", (Turn(question, spot.code),), ((image_block(canvas.picture),),))
    answers, maps = ask(model, processor, prepare(processor, [episode]), "top-down")
    overlay = processor.draw_selection(canvas.picture, maps).resize((SHEET_SIDE, SHEET_SIDE))
    centre = [(spot.box[side] + spot.box[side + 2]) // 2 for side in (0, 1)]
    corner = [min(max(at - CELL // 2, 0), SIDE - CELL) for at in centre]
    close = canvas.picture.crop((*corner, corner[0] + CELL, corner[1] + CELL))
    drawn = Image.new("RGB", (SHEET_SIDE + MARGIN + SHEET_SIDE // 2, SHEET_SIDE + CAPTION), "white")
    drawn.paste(overlay, (0, 0))
    drawn.paste(close.resize((SHEET_SIDE // 2, SHEET_SIDE // 2)), (SHEET_SIDE + MARGIN, 0))
    pen = ImageDraw.Draw(drawn)
    pen.text((4, SHEET_SIDE + 8), f"{question} {answers[0].strip()}", fill="black", font_size=18)
    return drawn


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="evaluate_hd.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="questions per mode (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--sheet", type=Path, help="a picture of what was looked at goes here")
    options = parser.parse_args(arguments)
    if options.samples < 1 or options.batch_size < 1:
        parser.error("--samples and --batch-size must be at least 1")
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=options.dtype).eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    if options.sheet:
        sheet(model, processor, options.seed).save(options.sheet)
    rows = score(model, processor, options.modes, options.samples, options.seed, options.batch_size)
    report = {"model": options.model, "seed": options.seed, "samples": options.samples, "scores": rows}
    sys.stdout.write((json.dumps(report, indent=2) if options.json else table_of(report)) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate_hd.py: {error}")
