"""Rows of training data, and the models that learn from them."""

from PIL import Image
from transformers import AutoModel

LITE = "nvila_lite_image"
PICTURE = {"type": "image", "image": Image.effect_noise((90, 60), 80).convert("RGB")}


def chat(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    return {"messages": ([] if system is None else [{"role": "system", "content": system}]) + messages}


def text(content):
    return {"type": "text", "text": content}


TEXT_ROW = chat("What is the number?", "42")
PICTURE_ROW = chat([PICTURE, text("Describe the image.")], "The cat stands on the table.", "And?", "A dog.")
TWO_PICTURES_ROW = chat([PICTURE], "A cat.", [PICTURE, text("And this?")], "A dog.")
ROWS = [PICTURE_ROW, TEXT_ROW]


def load(folder, **options):
    return AutoModel.from_pretrained(folder, dtype="float32", **options)


def kept(labels):
    return labels[labels != -100].tolist()


def learned_text(processor, row):
    return processor.tokenizer.decode(kept(row["labels"]))
