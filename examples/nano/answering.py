"""Asks a model the questions of trials, in batches, and counts the right answers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from episodes import Episode
from judge import TRIALS, is_right, wilson
from vocabulary import Split

BATCH_SIZE = 32


@dataclass(frozen=True)
class Score:
    """How many of a trial's questions were answered right.

    Attributes:
        chance: mean share that who sees nothing gets right.
        held_out: `{what was never trained on: (right, total)}`, e.g. for `"pair"` and `"phrasing"`.
    """

    trial: str
    right: int
    total: int
    chance: float
    held_out: dict[str, tuple[int, int]]

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    def as_dict(self) -> dict[str, Any]:
        low, high = wilson(self.right, self.total)
        goal = TRIALS[self.trial].goal
        return {
            "trial": self.trial,
            "accuracy": self.accuracy,
            "interval": [low, high],
            "chance": self.chance,
            "right": self.right,
            "total": self.total,
            "goal": goal and list(goal),
            "reached": None if goal is None else goal[0] <= self.accuracy <= goal[1],
            "held_out": {kind: {"right": right, "total": total} for kind, (right, total) in self.held_out.items()},
        }


def batched(episodes: Iterable[Episode], size: int) -> Iterator[list[Episode]]:
    iterator = iter(episodes)
    while batch := list(islice(iterator, size)):
        yield batch


@torch.no_grad()
def answer(
    model: Any, processor: Any, episodes: Sequence[Episode], max_new_tokens: int, options: dict[str, Any] | None = None
) -> list[str]:
    """Greedy answers to the last questions of episodes, all in one batch.

    Args:
        options: `processor_kwargs` of `apply_chat_template`.
    """
    inputs = processor.apply_chat_template(
        [episode.prompt for episode in episodes],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(options or {}),
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def score(
    model: Any,
    processor: Any,
    trial: str,
    samples: int,
    seed: int = 0,
    split: Split = "test",
    batch_size: int = BATCH_SIZE,
    progress: Any = None,
) -> Score:
    """Score of one trial.

    Args:
        samples: questions that are asked.
        progress: object with `update(number of answers)`, e.g. a `tqdm` bar.
    """
    settings, right, chance = TRIALS[trial], 0, 0.0
    held_out: dict[str, tuple[int, int]] = {}
    for episodes in batched(settings.episodes(samples, seed, split), batch_size):
        answers = answer(model, processor, episodes, settings.max_new_tokens, settings.options)
        for episode, text in zip(episodes, answers):
            is_correct = is_right(episode, text)
            right, chance = right + is_correct, chance + episode.target.chance
            for kind in episode.target.held_out:
                before = held_out.get(kind, (0, 0))
                held_out[kind] = (before[0] + is_correct, before[1] + 1)
        if progress is not None:
            progress.update(len(episodes))
    return Score(trial, right, samples, chance / samples, held_out)
