"""Models of random weights in every shape, their inputs, and how converted ones are loaded."""

import torch
from PIL import Image
from vila.configuration_vila import VilaConfig
from vila.modeling_vila import VilaForConditionalGeneration

TILE, SIDE = 42, 3  # pixels and patches per side of a tile of `tiny_config`
SCALES = [TILE, 2 * TILE, 3 * TILE]
CHECKPOINTS = (
    "nvila_lite_image",
    "nvila_dynamic_s2_image",
    "vila15_image",
    "vila15_s2_image",
    "vila15_llama3_image",
    "vila15_clip_image",
    "vila15_intern_image",
)


def tiny_config(vision=None, text=None, **options):
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": 14,
        **(vision or {}),
    }
    if vision_config["model_type"] == "siglip_vision_model":
        vision_config.setdefault("vision_use_head", False)
    text_config = {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        **(text or {}),
    }
    ids = {"image_token_id": 70, "video_token_id": 71}
    return VilaConfig(vision_config=vision_config, text_config=text_config, **{**ids, **options})


def randomize(module):
    """Fresh models have zero biases and unit norms, which would hide a bias or norm that is not applied."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return module.eval()


def tiny_model(*args, **options):
    return randomize(VilaForConditionalGeneration(tiny_config(*args, **options)))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(tiles, seed=0, side=TILE):
    return noise(tiles, 3, side, side, seed=seed)


def grids(*sizes):
    return torch.tensor([(1, rows, cols) for rows, cols in sizes])


def prompt(config, *counts):
    """One row of ids: text, and a block of placeholders for each of `counts`."""
    row = [1, 2]
    for number, count in enumerate(counts, start=3):
        row += [config.image_token_id] * count + [number]
    return torch.tensor([[*row, 9]])


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def load(folder, **options):
    return VilaForConditionalGeneration.from_pretrained(folder, **{"dtype": "float32", **options}).eval()


def picture(color, size=(60, 60)):
    return Image.new("RGB", size, color)


ENCODERS = {
    "plain": ({}, 12, TILE, [(2, 3), (1, 1), (2, 2)], [7, 1, 5]),
    "static": ({"s2": True, "s2_scales": SCALES}, 3, 3 * TILE, [(1, 1)] * 3, [1] * 3),
    "dynamic": ({"dynamic_s2": True, "s2_scales": SCALES}, 29, TILE, [(3, 3), (1, 1), (5, 2)], [14, 1, 15]),
}


def encoder_case(name):
    options, _, side, sizes, counts = ENCODERS[name]
    return tiny_model(**options), pixels(sum(counts), side=side), grids(*sizes), counts
