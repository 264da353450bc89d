"""What every training from scratch here has in common: options of `Trainer`, a log, and going on where it stopped."""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import recipe
import torch
import torch.nn.functional as F
from optimizer import MATRICES, MuonAdamW
from torch import nn
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

SAVES = 20
EMPTY_WEIGHT = 0.1  # of labels that say that nothing is there, which are most of them
FINAL, LOG = "final", "log.jsonl"


class Trainee(nn.Module):
    """A model with what it is trained by and loses afterwards: heads, further losses. Its weights change in place.

    Attributes:
        parts: of the last batch's loss.
    """

    # the loss is a sum of means: `Trainer` must not divide it by the number of all labels
    accepts_loss_kwargs = False

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.parts: dict[str, float] = {}
        tied = model._tied_weights_keys if model.config.get_text_config().tie_word_embeddings else {}
        self.second_names = {f"model.{name}": f"model.{source}" for name, source in tied.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without second names of tied weights, with which safetensors would not be written."""
        state = super().state_dict(*args, **kwargs)
        return {name: weight for name, weight in state.items() if name not in self.second_names}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        again = {name: state_dict[source] for name, source in self.second_names.items() if source in state_dict}
        return super().load_state_dict({**again, **state_dict}, strict, assign)


def load(folder: Path) -> Any:
    """A model in float32, as fast as a CPU trains it."""
    model = AutoModel.from_pretrained(folder, dtype="float32")
    if not torch.accelerator.is_available():
        # the fused kernel's backward pass is slower than plain products of so short rows
        model.set_attn_implementation("eager")
    return model


def weighed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy, `(N, classes, ...)` and `(N, ...)`, in which class 0 stands for nothing."""
    weights = torch.ones(logits.shape[1], device=logits.device)
    weights[0] = EMPTY_WEIGHT
    return F.cross_entropy(logits.float(), labels, weights)


def training_arguments(folder: Path, steps: int, **options: Any) -> TrainingArguments:
    """Options of a stage of so many steps, whose rows are a stream; `options` are further ones."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        warmup_steps=recipe.WARMUP_RATIO,  # below 1 it is a share of all steps
        max_grad_norm=recipe.MAX_GRAD_NORM,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=max(1, min(20, steps // 50)),
        save_steps=max(1, steps // SAVES),
        save_total_limit=2,
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        # batches of a stream would be cut to as many tiles as they have rows
        accelerator_config={"dispatch_batches": False},
        # the stream starts at the right row by itself, without drawing all those before it
        ignore_data_skip=True,
        report_to="none",
        **options,
    )


def steps_done(checkpoint: str | None) -> int:
    """Optimiser steps that a checkpoint has seen."""
    if checkpoint is None:
        return 0
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


class Log(TrainerCallback):
    """Appends every logged loss, and the parts of the last batch's where the trainee has them, to a file, one JSON
    object per line."""

    def __init__(self, path: Path, stage: str, trainee: Any):
        self.path, self.stage, self.trainee, self.started = path, stage, trainee, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            row = {"stage": self.stage, "step": state.global_step, "loss": logs["loss"]}
            row |= getattr(self.trainee, "parts", {})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "seconds": round(time.monotonic() - self.started, 1)}) + "\n")


def cosine_arguments(folder: Path, steps: int, batch: int, rate: float, options: argparse.Namespace) -> Any:
    """Options of a stage of so many steps times `--steps`."""
    return training_arguments(
        folder,
        max(1, round(steps * options.steps)),
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        seed=options.seed,
    )


def run_stage(
    trainee: Any,
    training: TrainingArguments,
    rows: Callable[..., Any],
    collator: Any,
    matrix_names: tuple[str, ...] = MATRICES,
) -> None:
    """Trains with Muon and AdamW in the folder that `training` names, and goes on from its last checkpoint.

    Args:
        rows: makes the dataset that starts at the row `start`.
        matrix_names: see `MuonAdamW`.
    """
    folder = Path(str(training.output_dir))
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    optimizer = MuonAdamW(trainee, training.learning_rate, recipe.WEIGHT_DECAY, recipe.BETA2, matrix_names)
    trainer = Trainer(
        trainee,
        training,
        data_collator=collator,
        train_dataset=rows(start=steps_done(last) * training.per_device_train_batch_size),
        optimizers=(optimizer, None),
        callbacks=[Log(folder.parent / LOG, folder.name, trainee)],
    )
    trainer.train(resume_from_checkpoint=last)


def parse_options(name: str, purpose: str, output: Path, arguments: list[str]) -> argparse.Namespace:
    """Options of a recipe of several stages; sets seed and threads."""
    parser = argparse.ArgumentParser(prog=name, description=purpose.split("\n")[0])
    parser.add_argument("--output", type=Path, default=output, help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=float, default=1.0, help="times the recipe's steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the arithmetic (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def run_stages(
    build: Callable[[Path, int], Any],
    stages: dict[str, Callable[[Path, Path, argparse.Namespace], None]],
    options: argparse.Namespace,
) -> Path:
    """Folder of the last stage. Every stage takes the folder before it and its own one; finished ones are skipped."""
    current = options.output / "untrained"
    if not (current / "config.json").is_file():
        build(current, options.seed)
    for name, stage in stages.items():
        folder = options.output / name
        if not (folder / FINAL / "config.json").is_file():
            stage(current, folder, options)
        current = folder / FINAL
    return current
