"""A needle in a video, frames by depth: `python examples/needle.py --model DIR --output OUT`.

Every answer is written to `OUT/needle.jsonl` as it comes, with the model and the seed, and a run of the same ones that
was stopped goes on; the grid is drawn to `OUT/needle.png`. Several grids beside each other:
`python examples/needle.py --draw OUT1 OUT2 --output both.png`.

A video that is longer than the model's context is asked all the same: the grid shows what becomes of it.
Several processes share every video: `torchrun --nproc-per-node 2 examples/needle.py ...`, on CPUs over gloo.
"""

import argparse
import json
import os
import sys
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from haystack import needle
from judge import check_words
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import cached_file
from vila.sequence_parallel_vila import SequenceParallel

FRAMES = [16, 32, 64, 128, 256, 512, 1024, 2048]
ANSWERS, PICTURE = "needle.jsonl", "needle.png"
MAX_NEW_TOKENS = 6


class Asker:
    """A model that is asked about one video at a time, by all processes together where there are several."""

    def __init__(self, folder: str, dtype: str):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.context = config.text_config.max_position_embeddings
        config.text_config.max_position_embeddings = sys.maxsize
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True, dtype=dtype)
        if torch.accelerator.is_available():
            # torchrun: every process on a machine has a device of its own
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
            model.to(torch.accelerator.current_accelerator())
        self.model, self.parallel, self.rank = model.eval(), None, 0
        self.weights = fingerprint(folder)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group()
            self.parallel, self.rank = SequenceParallel(self.model), dist.get_rank()
            # every machine has its own copy of the files
            weights = [self.weights]
            dist.broadcast_object_list(weights)
            self.weights = weights[0]

    def ask(self, messages: list[dict[str, Any]], frames: int) -> tuple[str, int]:
        """The answer, and the tokens of the prompt."""
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": frames},
        ).to(self.model.device)
        tokens = inputs["input_ids"].shape[1]
        prepared = self.parallel.prepare(**inputs) if self.parallel else inputs
        output = self.model.generate(**prepared, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return self.processor.decode(output[0, tokens:], skip_special_tokens=True).strip(), tokens

    def close(self) -> None:
        """Waits for the other processes: one that ends while others still talk to it takes them with it."""
        if self.parallel:
            dist.barrier()
            dist.destroy_process_group()


def read(path: Path) -> list[dict[str, Any]]:
    """Answers of earlier runs; a line that was cut off by an interruption is left out."""
    answers = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            answers.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return answers


def fingerprint(folder: str) -> str:
    """Of the names, sizes and times of a checkpoint's config and weights: changed by other ones in the same folder."""
    local = Path(cached_file(folder, "config.json")).parent
    files = [local / "config.json", *sorted(local.glob("*.safetensors"))]
    described = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{zlib.crc32(repr(described).encode()):08x}"


def asked_before(path: Path, asked: dict[str, Any]) -> set[tuple[int, float, int]]:
    """Cells that have an answer: frames, depth and trial.

    Raises:
        ValueError: if the answers are those of another model or another seed than `asked`.
    """
    answers = read(path)
    for answer in answers:
        others = {name: answer.get(name) for name in asked if name != "model" and answer.get(name) != asked[name]}
        if others:
            raise ValueError(
                f"{path} holds answers of {answer.get('model', 'an unknown model')} with other "
                f"{' and '.join(others)} than asked for now: take another --output, or delete it"
            )
    return {(answer["frames"], answer["depth"], answer["trial"]) for answer in answers}


def measure(asker: Asker, options: argparse.Namespace) -> None:
    """Asks what has not been asked yet."""
    path = options.output / ANSWERS
    asked = {"model": options.model, "weights": asker.weights, "dtype": options.dtype, "seed": options.seed}
    done = asked_before(path, asked)
    depths = [number / (options.depths - 1) for number in range(options.depths)] if options.depths > 1 else [0.5]
    cells = [(f, d, t) for t in range(options.trials) for f in options.frames for d in depths]
    with path.open("a", encoding="utf-8") as file, torch.inference_mode():
        if file.tell() and not path.read_text(encoding="utf-8").endswith("\n"):
            file.write("\n")
        for frames, depth, trial in tqdm([cell for cell in cells if cell not in done], disable=asker.rank > 0):
            messages, expected = needle(f"{options.seed}/{frames}/{depth}/{trial}", frames, depth)
            answer, tokens = asker.ask(messages, frames)
            row = {"frames": frames, "depth": depth, "trial": trial, "tokens": tokens, "context": asker.context}
            row |= {"answer": answer, "expected": expected, "right": check_words(answer, expected), **asked}
            if asker.rank == 0:
                file.write(json.dumps(row) + "\n")
                file.flush()


def grid(answers: list[dict[str, Any]]) -> dict[tuple[int, float], float]:
    """Share of right answers by frames and depth."""
    cells = defaultdict(list)
    for answer in answers:
        cells[answer["frames"], answer["depth"]].append(answer["right"])
    return {cell: sum(right) / len(right) for cell, right in cells.items()}


def draw(runs: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """The grids beside each other; a line marks the end of the context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(1 + 5.2 * len(runs), 4), squeeze=False, sharey=True)
    for axis, (name, answers) in zip(axes[0], runs.items()):
        cells = grid(answers)
        frames, depths = (sorted({cell[i] for cell in cells}) for i in range(2))
        values = [[cells.get((count, depth), float("nan")) for count in frames] for depth in depths]
        image = axis.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, x in ((y, x) for y in range(len(depths)) for x in range(len(frames))):
            axis.text(x, y, f"{100 * values[y][x]:.0f}", ha="center", va="center", fontsize="small")
        beyond = {answer["frames"] for answer in answers if answer["tokens"] > answer["context"]}
        if beyond:
            axis.axvline(frames.index(min(beyond)) - 0.5, color="black", linestyle="--")
        axis.set(title=f"{name}, context {answers[0]['context']}", xlabel="frames")
        axis.set_xticks(range(len(frames)), frames)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes[0].tolist(), label="right answers")
    figure.savefig(target, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="needle.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder of the answers; with --draw the picture")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES, help="default: %(default)s")
    parser.add_argument("--depths", type=int, default=11, help="from 0 to 100 %%, one at 50 %% (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=4, help="videos per cell (default: %(default)s)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", type=Path, nargs="+", metavar="OUT", help="only draws the grids of these folders")
    options = parser.parse_args(arguments)
    if not options.draw and not options.model:
        parser.error("--model is needed")
    if options.depths < 1 or options.trials < 1:
        parser.error("at least one depth and one trial are needed")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.draw:
        names = [folder.name for folder in options.draw]
        if len(set(names)) < len(names):
            names = list(map(str, options.draw))
        runs = {name: read(folder / ANSWERS) for name, folder in zip(names, options.draw)}
        if empty := [name for name, answers in runs.items() if not answers]:
            raise ValueError(f"there are no answers in {', '.join(empty)}")
        draw(runs, options.output)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    asker = Asker(options.model, options.dtype)
    measure(asker, options)
    asker.close()
    if asker.rank == 0:
        answers = read(options.output / ANSWERS)
        draw({options.output.name: answers}, options.output / PICTURE)
        right = sum(answer["right"] for answer in answers)
        sys.stdout.write(f"{right} of {len(answers)} right, {options.output / PICTURE}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"needle.py: {error}")
