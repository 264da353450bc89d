"""The log of a run: losses and accuracies on the validation split, one JSON object per line."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from answering import score
from grounding import GroundedTraining
from recipe import Stage
from tower import TowerPretraining
from transformers import TrainerCallback

SAMPLES = 64
LOG = "log.jsonl"


class Monitor(TrainerCallback):
    """Writes the loss of every logging step, and the accuracies of `stage.watched` from time to time.

    Args:
        path: the log; a stage that goes on appends to it.
        rows_per_step: conversations of one optimiser step.
        every: optimiser steps between two measurements of accuracy.
        samples: questions per trial.
    """

    def __init__(
        self, path: Path, stage: Stage, processor: Any, rows_per_step: int, every: int, samples: int = SAMPLES
    ):
        self.path, self.stage, self.processor = path, stage, processor
        self.rows_per_step, self.every, self.samples = rows_per_step, every, samples
        self.started = time.monotonic()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            values = {name: logs[name] for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            self._write(state, values | getattr(model, "parts", {}))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._write(state, {"accuracy": self.accuracies(model)})

    def accuracies(self, model: Any) -> dict[str, float]:
        """Accuracy of every watched trial, or of a tower's labels, on the validation split."""
        was_training = model.training
        model.eval()
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            if isinstance(model, TowerPretraining):
                found = model.accuracies()
            else:
                answering = model.model if isinstance(model, GroundedTraining) else model
                found = {
                    trial: score(answering, self.processor, trial, self.samples, split="validation").accuracy
                    for trial in self.stage.watched
                }
        model.train(was_training)
        return found

    def _write(self, state: Any, values: dict[str, Any]) -> None:
        row = {
            "stage": self.stage.name,
            "step": state.global_step,
            "samples": state.global_step * self.rows_per_step,
            "seconds": round(time.monotonic() - self.started, 1),
            **values,
        }
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
