"""Scores a VILA checkpoint on what was never trained on: `python examples/nano/evaluate.py --model DIR`.

Every score comes with its 95 % interval and with the chance level: what reading the questions alone would give.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from answering import BATCH_SIZE, Score, score
from judge import TRIALS
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "checkpoints" / "vila-nano"
SAMPLES = 400


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="questions per row (default: %(default)s)")
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS), metavar="ROW", help="rows")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument("--device", default=None, help="default: an accelerator if there is one")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if options.samples < 1 or options.batch_size < 1:
        parser.error("--samples and --batch-size must be at least 1")
    return options


def evaluate(model: object, processor: object, options: argparse.Namespace) -> list[Score]:
    with tqdm(total=options.samples * len(options.trials), unit="answer", file=sys.stderr) as progress:
        scores = []
        for trial in options.trials:
            progress.set_description(trial)
            scores.append(
                score(
                    model,
                    processor,
                    trial,
                    options.samples,
                    seed=options.seed,
                    batch_size=options.batch_size,
                    progress=progress,
                )
            )
    return scores


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown of rows that `Score.as_dict` made."""
    lines = ["| task | score | 95 % interval | chance | goal |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["interval"]
        goal = "" if row["goal"] is None else f"{100 * row['goal'][0]:.0f} to {100 * row['goal'][1]:.0f} %"
        lines.append(
            f"| {row['trial']} | {100 * row['accuracy']:.1f} % | {100 * low:.1f} to {100 * high:.1f} % | "
            f"{100 * row['chance']:.1f} % | {goal} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    device = options.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=options.dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    scores = evaluate(model, processor, options)
    rows = [row.as_dict() for row in scores]
    if options.json:
        content = {"model": options.model, "seed": options.seed, "samples": options.samples, "scores": rows}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        sys.stdout.write(table_of(rows) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")
