"""What the released sizes need at least, as a table: `python benchmarks/memory.py`.

Computed from the shapes of the models, which are built without weights: nothing is measured. Weights and cache in
bfloat16; a picture is one that is cut into as many tiles as the checkpoint allows. What a call needs besides, a few
activations of one chunk, is small beside these.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel
from vila.geometry_vila import TileGrid, num_image_tokens, num_tiles
from vila.memory_vila import cached_values
from vila.original_config_vila import to_vila_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_families import FAMILIES

BYTES = 2
CONTEXTS = (4096, 32768)
MAX_TILES = 12


def picture(config, mode: str) -> tuple[int, int]:
    """Tokens and tiles of one picture at the most."""
    scales = config.dynamic_scales
    grid = TileGrid(1, MAX_TILES) if mode in ("dynamic", "dynamic_s2") else TileGrid(1, 1)
    tokens = num_image_tokens(grid, config.num_tile_tokens, scales, config.s2_resize_output_to_scale_idx)
    return tokens, num_tiles(grid, scales)


def row(name: str) -> str:
    llm, tower, projector, root, _, _ = FAMILIES[name]
    config = to_vila_config(root, llm, tower, {"mm_projector_type": projector}, image_token_id=1, video_token_id=2)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    # `parameters` counts shared ones once
    weights = BYTES * sum(parameter.numel() for parameter in model.parameters())
    text = config.text_config
    cache = cached_values(text) * BYTES
    tokens, tiles = picture(config, root["image_aspect_ratio"])
    pixels = tiles * 3 * tower["image_size"] ** 2 * BYTES
    # the release's own limit where the language model's is not known
    longest = max(text.max_position_embeddings, CONTEXTS[0])
    totals = " | ".join(
        f"{(weights + pixels + context * cache) / 1e9:.1f}" if context <= longest else "-" for context in CONTEXTS
    )
    return f"| {name} | {weights / 1e9:.1f} | {cache * 1000 / 1e6:.0f} | {tokens} | {totals} |"


def main() -> None:
    contexts = " | ".join(f"GB in all, {context // 1024}k tokens" for context in CONTEXTS)
    sys.stdout.write(f"| checkpoint | weights, GB | cache per 1,000 tokens, MB | tokens of a picture | {contexts} |\n")
    sys.stdout.write("|---" * (4 + len(CONTEXTS)) + "|\n")
    for name in FAMILIES:
        sys.stdout.write(row(name) + "\n")


if __name__ == "__main__":
    main()
