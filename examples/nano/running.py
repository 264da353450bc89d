"""What every training from scratch here has in common: the options of `Trainer`, and how far a run had come."""

import json
from pathlib import Path
from typing import Any

import recipe
import torch
from transformers import TrainingArguments

SAVES = 20


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
