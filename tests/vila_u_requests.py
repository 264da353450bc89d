"""What the tests of VILA-U ask a model for."""

from conftest import VILA_U_CASE

CASE = VILA_U_CASE
PROMPTS = ["A snowy mountain.", "Fireworks in the air, over a river, at night.", "Cats."]
LIKELIEST = {"do_sample": False}


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
