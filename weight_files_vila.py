"""Safetensors files of a checkpoint: finding, indexing, linking, and re-grouping them one shard at a time."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .weight_names_vila import PART_PREFIXES, original_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")


class Shard(NamedTuple):
    """One safetensors file: its path, name -> shape, the bytes of its tensors and their most frequent dtype."""

    path: Path
    shapes: dict[str, list[int]]
    num_bytes: int
    dtype: str


def find_shards(folder: Path) -> list[Shard]:
    """The safetensors files of a folder, complete and readable.

    Raises:
        FileNotFoundError: if there are none, or the index names one that is missing.
        ValueError: if there are only pickle files, or a file is damaged.
    """
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder.name}: {INDEX} names {missing[0]!r}, which is missing")
        return [read_header(folder / name) for name in names]
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths and any(any(folder.glob(pattern)) for pattern in PICKLES):
        raise ValueError(f"{folder.name} holds pickle files only; save the weights as safetensors first")
    if not paths:
        raise FileNotFoundError(f"{folder.name} holds no model*.safetensors")
    return [read_header(path) for path in paths]


def read_header(path: Path) -> Shard:
    shapes: dict[str, list[int]] = {}
    dtypes: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(name)
                shapes[name] = tensor.get_shape()
                dtypes.append(tensor.get_dtype())
    except Exception as error:
        raise ValueError(f"{path.parent.name}/{path.name} is no readable safetensors file") from error
    num_bytes = path.stat().st_size - 8 - int.from_bytes(read_first_bytes(path), "little")
    return Shard(path, shapes, num_bytes, max(set(dtypes), key=dtypes.count) if dtypes else "F32")


def read_first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def part_shards(source: Path) -> dict[str, list[Shard]]:
    return {part: find_shards(source / part) for part in PART_PREFIXES}


def write_index(path: Path, weight_map: dict[str, str], num_bytes: int) -> None:
    content = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n")


def index_parts(shards: dict[str, list[Shard]], target: Path, separator: str) -> None:
    """Writes an index of the files as they are: `/` points into the part folders, `-` to the links of `link_parts`."""
    weight_map = {
        name: f"{part}{separator if part else ''}{shard.path.name}"
        for part, files in shards.items()
        for shard in files
        for name in shard.shapes
    }
    num_bytes = sum(shard.num_bytes for files in shards.values() for shard in files)
    write_index(target / INDEX, weight_map, num_bytes)


def link_parts(shards: dict[str, list[Shard]], target: Path) -> None:
    """Links the weight files of every part into `target`, by symbolic link.

    The links lie side by side: transformers' disk offload looks for all files of a model in one folder.
    """
    for part, files in shards.items():
        for shard in files:
            os.symlink(shard.path.resolve(), target / f"{part}{'-' if part else ''}{shard.path.name}")


def copy_to_root(shards: dict[str, list[Shard]], target: Path) -> None:
    """Writes every file of every part as a root shard with whole-model names, one at a time."""
    files = [(part, shard) for part, part_files in shards.items() for shard in part_files]
    weight_map: dict[str, str] = {}
    for number, (part, shard) in enumerate(
        tqdm(files, desc="Copying weights", unit="shard", disable=len(files) <= 3), start=1
    ):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(shard.path, framework="pt") as file:
            tensors = {PART_PREFIXES.get(part, "") + key: file.get_tensor(key) for key in shard.shapes}
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    write_index(target / INDEX, weight_map, sum(shard.num_bytes for _, shard in files))


def placed_names(shard: Shard) -> dict[str, tuple[str, str]]:
    """Name in the file -> `(part, name in the part)`, whatever spelling the file uses."""
    for part in PART_PREFIXES:
        in_folder = shard.path.parent.name == part and (shard.path.parent.parent / INDEX).is_file()
        if in_folder or shard.path.name.startswith(f"{part}-"):
            return {name: (part, name) for name in shard.shapes}
    placed = {}
    for name in shard.shapes:
        try:
            placed[name] = original_name(name)
        except KeyError as error:
            raise ValueError(
                f"{shard.path.name}: {name!r} belongs to no part of a VILA model, or was saved with "
                "save_original_format=False: save the model with original names"
            ) from error
    return placed


def split_to_parts(shards: Iterable[Shard], target: Path, extra_tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    """Writes the tensors of any folder of this package into part folders with the names of the original.

    Args:
        extra_tensors: part -> tensors that the shards lack, written beside the part's last shard.
    """
    placed = [(shard, placed_names(shard)) for shard in shards]
    jobs = [(part, shard, names) for part in PART_PREFIXES for shard, names in placed if has_part(names, part)]
    for part in PART_PREFIXES:
        own = [(shard, names) for job_part, shard, names in jobs if job_part == part]
        weight_map: dict[str, str] = {}
        for number, (shard, names) in enumerate(
            tqdm(own, desc=f"Writing {part}", unit="shard", disable=len(own) <= 1), start=1
        ):
            name = SINGLE if len(own) == 1 else f"model-{number:05d}-of-{len(own):05d}.safetensors"
            with safe_open(shard.path, framework="pt") as file:
                tensors = {new: file.get_tensor(old) for old, (in_part, new) in names.items() if in_part == part}
            if number == len(own):
                tensors |= extra_tensors.get(part, {})
            save_file(tensors, target / part / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if len(own) > 1:
            write_index(target / part / INDEX, weight_map, sum(shard.num_bytes for shard, _ in own))


def has_part(names: dict[str, tuple[str, str]], part: str) -> bool:
    return any(in_part == part for in_part, _ in names.values())
