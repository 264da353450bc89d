"""Safetensors files of any size that take no space: a real header before a hole."""

import json
import math
from pathlib import Path


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A file of bfloat16 tensors with these names and shapes, all zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_shards(folder: Path, shapes: dict[str, list[int]], count: int) -> None:
    """`count` files of about as many tensors each, with their index."""
    names, weight_map = list(shapes), {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        own = names[shard * len(names) // count : (shard + 1) * len(names) // count]
        write_sparse(folder / file, {name: shapes[name] for name in own})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
