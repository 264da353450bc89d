"""Chats with pictures, and what their processor makes of them."""

import itertools

from PIL import Image
from vila.chat_templates_vila import named_template
from vila.image_processing_vila import VilaImageProcessor
from vila.processing_vila import VilaProcessor

CASES = ("nvila_lite_image", "nvila_dynamic_s2_image", "vila15_image", "vila15_llama3_image", "remote_vila15_image")
# the five templates, each with a tokenizer that knows its control tokens
TEMPLATES = {
    "qwen2": "nvila_lite_image",
    "hermes-2": "nvila_lite_image",
    "vicuna_v1": "vila15_image",
    "mistral": "vila15_image",
    "llama_3": "vila15_llama3_image",
}
TILE = 14
WIDE, TALL, SMALL = (Image.new("RGB", size, "red") for size in ((60, 20), (20, 40), (10, 10)))


def tiling_processor(tokenizer, template):
    """A processor of small tiles, which cuts every picture of a chat."""
    size = {"height": TILE, "width": TILE}
    tiles = VilaImageProcessor(image_mode="dynamic", size=size, tile_multiple_images=True)
    return VilaProcessor(tiles, tokenizer, chat_template=named_template(template), num_tile_tokens=3)


def image(picture=SMALL):
    return {"type": "image", "image": picture}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(*content):
    return {"role": "assistant", "content": list(content)}


def pictures_of(chat):
    return [part["image"] for message in chat for part in message["content"] if isinstance(part, dict)]


def encode(processor, chat, processor_kwargs=None, **options):
    return processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, processor_kwargs=processor_kwargs, **options
    )


def ids_of(processor, chat, **options):
    return encode(processor, chat, **options)["input_ids"][0]


def runs(flags):
    """`(value, length)` of each run."""
    return [(value, len(list(group))) for value, group in itertools.groupby(flags)]
