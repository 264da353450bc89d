"""Draws the log of a run: `python examples/nano/plot.py nano-run/log.jsonl nano.png`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a log, with `total`: conversations since the first stage began. What was done twice is kept once."""
    kept: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kept[row["stage"], row["step"], "accuracy" in row] = row
    before, lengths = 0, dict[str, int]()
    for row in kept.values():
        lengths[row["stage"]] = max(lengths.get(row["stage"], 0), row["samples"])
    starts = {}
    for stage, length in lengths.items():
        starts[stage], before = before, before + length
    return [{**row, "total": starts[row["stage"]] + row["samples"]} for row in kept.values()]


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Loss above, accuracies on the validation split below, over conversations; stages apart by lines."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(1, 2))
    losses = [row for row in rows if "loss" in row]
    above.plot([row["total"] for row in losses], [row["loss"] for row in losses], color="black", linewidth=0.8)
    above.set(ylabel="loss", yscale="log")
    measured = [row for row in rows if "accuracy" in row]
    for number, trial in enumerate(dict.fromkeys(trial for row in measured for trial in row["accuracy"])):
        points = [(row["total"], row["accuracy"][trial]) for row in measured if trial in row["accuracy"]]
        below.plot(*zip(*points), label=trial, linestyle="-" if number < 10 else "--", marker=".", linewidth=1)
    below.set(xlabel="conversations", ylabel="accuracy, validation split", ylim=(0, 1.02))
    below.legend(fontsize="small", ncols=2)
    for number, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
        start = min(row["total"] for row in rows if row["stage"] == stage)
        for axes in (above, below):
            axes.axvline(start, color="grey", linewidth=0.5)
        # short stages would write over each other
        above.text(start, 1.02 + 0.09 * (number % 4), stage, transform=above.get_xaxis_transform(), fontsize="small")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="plot.py", description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    plot(read(options.log), options.target)
    sys.stdout.write(f"{options.target}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
