"""Teaches vila-nano with LoRA what it never saw, in minutes on a CPU: `python examples/finetune_lora.py`.

The task is to say where an arrow points. For your own, replace `draw_row`: a row is a conversation in the usual form.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from torch.utils.data import IterableDataset
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments, set_seed
from vila.training_vila import LORA_TARGETS, VilaDataCollator

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKPOINT = REPOSITORY / "checkpoints" / "vila-nano"
WAYS = ("east", "south east", "south", "south west", "west", "north west", "north", "north east")
QUESTION = "Where does the arrow point?"
SIDE, SCALE = 112, 4
RANK, ALPHA, LEARNING_RATE, BATCH_SIZE = 16, 32, 2e-3, 32
TEST_ROWS = 128


def draw_arrow(rng: random.Random, way: int) -> Image.Image:
    """An arrow of any size and dark colour somewhere on a light ground."""
    ground = rng.randint(205, 245)
    picture = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), (ground,) * 3)
    length, angle = rng.uniform(20, 40), math.radians(45 * way + rng.uniform(-8, 8))
    x, y = (rng.uniform(length + 4, SIDE - length - 4) for _ in range(2))

    def at(along: float, across: float) -> tuple[float, float]:
        dx = along * math.cos(angle) - across * math.sin(angle)
        dy = along * math.sin(angle) + across * math.cos(angle)
        return (x + length * dx) * SCALE, (y + length * dy) * SCALE

    outline = [(-1, -0.12), (0.2, -0.12), (0.2, -0.45), (1, 0), (0.2, 0.45), (0.2, 0.12), (-1, 0.12)]
    colour = (rng.randint(0, 120), rng.randint(0, 120), rng.randint(0, 120))
    ImageDraw.Draw(picture).polygon([at(*corner) for corner in outline], fill=colour)
    return picture.reduce(SCALE)


def draw_row(rng: random.Random) -> dict[str, Any]:
    """One conversation: a picture, a question and the answer to be learned."""
    way = rng.randrange(len(WAYS))
    content = [{"type": "image", "image": draw_arrow(rng, way)}, {"type": "text", "text": QUESTION}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": WAYS[way]}]}
    return {"messages": [{"role": "user", "content": content}, answer]}


class Arrows(IterableDataset):
    """Rows without end."""

    def __init__(self, seed: int):
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(self.seed)
        while True:
            yield draw_row(rng)


@torch.no_grad()
def accuracy(model: Any, processor: Any, rows: list[dict[str, Any]]) -> float:
    """Share of the rows whose answers are exactly right."""
    inputs = processor.apply_chat_template(
        [row["messages"][:-1] for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = [row["messages"][-1]["content"][0]["text"] for row in rows]
    return sum(answer.strip() == text for answer, text in zip(answers, expected)) / len(rows)


def finetune(model: Any, processor: Any, output: Path, steps: int, seed: int = 0) -> tuple[Any, list[float]]:
    """Trains adapters, writes them to `output` and merges them into the weights.

    Returns:
        the merged model and the losses by logging step.
    """
    set_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LORA_TARGETS))
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # below 1 it is a share of all steps
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        remove_unused_columns=False,
        # batches of a stream would be cut to as many tiles as they have rows
        accelerator_config={"dispatch_batches": False},
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        adapted,
        arguments,
        data_collator=VilaDataCollator(processor),
        train_dataset=Arrows(seed),
        processing_class=processor,
    )
    trainer.train()
    adapted.save_pretrained(output / "adapter")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return adapted.merge_and_unload().eval(), losses


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="finetune_lora.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(CHECKPOINT), help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "arrow-lora", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=220, help=f"of {BATCH_SIZE} rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype="float32")
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    rng = random.Random(f"test/{options.seed}")
    rows = [draw_row(rng) for _ in range(TEST_ROWS)]
    before = accuracy(model, processor, rows)
    merged, losses = finetune(model, processor, options.output, options.steps, options.seed)
    merged.save_pretrained(options.output / "merged")
    processor.save_pretrained(options.output / "merged")
    report = {
        "before": before,
        "after": accuracy(merged, processor, rows),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
