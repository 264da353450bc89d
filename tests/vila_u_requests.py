"""What the tests of VILA-U ask a model for."""

import numpy as np
from conftest import VILA_U_CASE
from PIL import Image

CASE = VILA_U_CASE
PROMPTS = ["A snowy mountain.", "Fireworks in the air, over a river, at night.", "Cats."]
LIKELIEST = {"do_sample": False}


def noise_picture(seed, size=(60, 60)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(*content):
    blocks = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": blocks}]


def draw(model, processor, prompts, mode="image", negative_text=None, **options):
    inputs = processor(text=prompts, generation_mode=mode, negative_text=negative_text, return_tensors="pt")
    return model.generate(**inputs, generation_mode=mode, **{**LIKELIEST, **options})


def encode(processor, chat, **options):
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
