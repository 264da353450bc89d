"""An endless stream of conversations for any `transformers.Trainer`, with `VilaDataCollator`.

- A batch is as slow as its longest row: it holds conversations of one size (so many tiles), which is drawn anew for
  every batch, and those of a window of batches are sorted by length among the batches of their size.
- Batch number n is the same wherever the stream starts: a run that was stopped goes on, with as many workers and
  processes, with the data that it would have seen.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import documents
import judge
import practice
import reading
import scenes
import shots
from episodes import Episode
from torch.utils.data import IterableDataset, get_worker_info
from vocabulary import Split

TASKS: dict[str, Callable[[random.Random, Split], Episode]] = {
    **{name: task for name, task in judge.TASKS.items() if not name.startswith("fewshot")},
    "caption": scenes.caption,
    "dialogue": scenes.dialogue,
    "transcribe": reading.transcribe,
    "fewshot": shots.fewshot,
    "interleaved": documents.interleaved,
    "pair": documents.pair,
    "look": practice.look,
    "tally": practice.tally,
    "contrast": practice.contrast,
}
# tasks whose conversations are about as large as each other
SIZES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "picture": ("naming", "yes_no", "count", "read", "chart", "caption", "dialogue", "transcribe", "pair"),
    "two pictures": ("compare",),
    "questioned picture": ("look", "tally"),
    "questioned pictures": ("contrast",),
    "document": ("interleaved",),
    "receipt": ("receipt_steps", "receipt_direct"),
    "banner": ("tiles",),
    "shots": ("fewshot",),
    "clip": ("direction", "order", "flashes"),
}


WINDOW = 16  # batches
PIECE = re.compile(r" ?[A-Z]?[a-z]+|\S|\s")
TURN_TOKENS, PICTURE_TOKENS = 9, 26


def length_of(episode: Episode) -> int:
    """About how many tokens a conversation has."""
    texts = [text for turn in episode.turns for text in (turn.question, turn.answer)]
    pictures = sum(len(blocks) for blocks in episode.media)
    return sum(len(PIECE.findall(text)) for text in texts) + TURN_TOKENS * len(texts) // 2 + PICTURE_TOKENS * pictures


def size_of(task: str) -> str:
    return next(size for size, tasks in SIZES.items() if task in tasks)


class NanoDataset(IterableDataset):
    """Rows `{"messages": [...], "things": ...}`, `batch_size` of one size after each other.

    `TrainingArguments` need `accelerator_config={"dispatch_batches": False}`: what accelerate does with streams by
    default cuts every tensor of a batch to the number of rows, tiles included.

    Args:
        mixture: share of every task of `TASKS`; they need not add up to 1.
        batch_size: rows of a device batch. The `DataLoader` must have the same.
        seed: of everything that is drawn.
        start: number of the first batch.
        batches: after how many it ends; None for never.
        process, processes: takes every so manyth batch, where nothing else shares them out. `Trainer` does.
        split: `"train"` or `"validation"`.

    Raises:
        ValueError: for an unknown task, a mixture without any, or the test split.
    """

    def __init__(
        self,
        mixture: Mapping[str, float],
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        batches: int | None = None,
        process: int = 0,
        processes: int = 1,
        split: Split = "train",
    ):
        if not set(mixture) <= set(TASKS) or not any(share > 0 for share in mixture.values()):
            raise ValueError(f"a mixture needs tasks of {', '.join(TASKS)}, got {dict(mixture)}")
        if split == "test":
            raise ValueError("the test split is for the judge alone")
        self.mixture = {task: share for task, share in mixture.items() if share > 0}
        self.batch_size, self.seed, self.start, self.batches = batch_size, seed, start, batches
        self.process, self.processes, self.split = process, processes, split

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        own, others = (worker.id, worker.num_workers) if worker else (0, 1)
        streams = self.processes * others
        number = self.start + self.process + self.processes * own
        drawn, batches = -1, list[list[Episode]]()
        while self.batches is None or number < self.start + self.batches:
            # every stream has windows of its own, so that none is drawn twice
            window, slot = divmod(number // streams, WINDOW)
            if window != drawn:
                drawn, batches = window, self.window(window * streams + number % streams)
            yield from ({"messages": episode.messages, "things": episode.things} for episode in batches[slot])
            number += streams

    def window(self, number: int) -> list[list[Episode]]:
        """`WINDOW` batches."""
        rng = random.Random(f"{self.split}/{self.seed}/{number}")
        sizes = [size_of(task) for task in rng.choices(list(self.mixture), list(self.mixture.values()), k=WINDOW)]
        batches: dict[str, list[list[Episode]]] = {}
        for size, count in Counter(sizes).items():
            alike = {task: share for task, share in self.mixture.items() if size_of(task) == size}
            tasks = rng.choices(list(alike), list(alike.values()), k=count * self.batch_size)
            episodes = sorted((TASKS[task](rng, self.split) for task in tasks), key=length_of)
            batches[size] = [
                episodes[start : start + self.batch_size] for start in range(0, len(tasks), self.batch_size)
            ]
            rng.shuffle(batches[size])
        return [batches[size].pop() for size in sizes]
