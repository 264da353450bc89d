"""The way back: a folder of this package -> the research layout, `llm/`, `vision_tower/`, `mm_projector/`.

Weights lie in the folders under the names of the original, whatever spelling they were saved in. What VILA does not
use, and a fine-tuned checkpoint therefore lacks, is made up for where readers would otherwise stumble.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from .families_vila import FAMILIES, VILA, VILA_HD, VILA_U, Family
from .original_config_vila import to_original_configs
from .original_config_vila_hd import to_original_hd_configs
from .original_config_vila_u import ORIGINAL_GENERATION, to_original_u_configs
from .tokenizer_files_vila import save_original_tokenizer, save_original_u_tokenizer
from .weight_files_vila import DTYPES, Shard, find_shards, placed_names, split_to_parts
from .weight_names_vila import PART_PREFIXES

CODEBOOK = "rqvaesiglip.quantizer.codebooks.{}.weight"
SIGLIP_U = "rqvaesiglip.siglip_model."


def to_original(source: str | Path, target: str | Path) -> Path:
    """Writes a folder of this package in the research layout.

    Tower layers that VILA does not use, and which a fine-tuned checkpoint therefore lacks, are written as zeros:
    readers that select the tower's second-to-last layer by number then find it. Of VILA-U's shared codebook every
    depth gets its copy. The text side of its tower, and PS3's pooling, are written if they are there.

    Raises:
        ValueError: if the source is not a folder of this package, or its weights are int4.
        FileNotFoundError: if it lacks the sentencepiece model that the original VILA-U needs.
        FileExistsError: if the target exists and is not empty.
    """
    source, target = Path(source), Path(target)
    family = family_of_folder(source)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty")
    if family is VILA_U and not (source / "tokenizer.model").is_file():
        raise FileNotFoundError(
            f"{source} has no tokenizer.model, which the original VILA-U reads: copy it from the checkpoint that this "
            "one was made of"
        )
    config = family.config_class.from_pretrained(source)
    processor = family.processor_class.from_pretrained(source)
    shards = find_shards(source)
    shapes = part_shapes(shards)
    extra_tensors = {"vision_tower": missing_tensors(family, config, shards, shapes["vision_tower"])}
    if hasattr(config.vision_config, "vision_use_head"):
        config.vision_config.vision_use_head = any(".head." in name for shard in shards for name in shard.shapes)
    for sub_config in (config.text_config, config.vision_config):
        sub_config.dtype = DTYPES.get(shards[0].dtype, "float32")
    for name, content in describe(family, config, processor, shapes).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(json.dumps(content, indent=2, default=str) + "\n")
    save_language_files(family, source, target / "llm", processor)
    split_to_parts(shards, target, extra_tensors)
    return target


def family_of_folder(source: Path) -> Family:
    file = source / "config.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    family = FAMILIES.get(str(content.get("model_type")))
    if family is None or family not in (VILA, VILA_HD, VILA_U) or content["model_type"] != family.model_type:
        raise ValueError(f"{source} is no converted VILA checkpoint")
    if content.get("quantization_config"):
        raise ValueError(f"the weights of {source} are int4, which the original does not read: dequantise the model")
    return family


def part_shapes(shards: list[Shard]) -> dict[str, dict[str, list[int]]]:
    """Part -> name there -> shape of its tensor."""
    shapes: dict[str, dict[str, list[int]]] = {part: {} for part in PART_PREFIXES}
    for shard in shards:
        for stored, (part, name) in placed_names(shard).items():
            shapes[part][name] = shard.shapes[stored]
    return shapes


def describe(
    family: Family, config: Any, processor: Any, shapes: dict[str, dict[str, list[int]]]
) -> dict[str, dict[str, Any]]:
    """File name -> content of the configs."""
    if family is VILA_U:
        return to_original_u_configs(config, processor, shapes["vision_tower"])
    return (to_original_hd_configs if family is VILA_HD else to_original_configs)(config, processor)


def save_language_files(family: Family, source: Path, folder: Path, processor: Any) -> None:
    """Tokenizer and generation options."""
    generation = GenerationConfig.from_pretrained(source)
    if family is VILA_U:
        save_original_u_tokenizer(processor.tokenizer, folder)
        ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = GenerationConfig(**ids, **ORIGINAL_GENERATION)
    else:
        save_original_tokenizer(processor.tokenizer, folder)
    if (source / "tokenizer.model").is_file():
        shutil.copy(source / "tokenizer.model", folder)
    generation.save_pretrained(folder)


def missing_tensors(
    family: Family, config: Any, shards: list[Shard], shapes: dict[str, list[int]]
) -> dict[str, torch.Tensor]:
    """What the checkpoint lacks of the tower: layers behind the selected one, the final norm, copies of a codebook."""
    if family is VILA_HD:
        return {}  # the last block's output is part of the choice: all blocks are there
    expected = {
        name.replace("layers.0.", f"layers.{layer}."): shape
        for name, shape in shapes.items()
        for layer in range(config.vision_config.num_hidden_layers)
        if "encoder.layers.0." in name and ".text_model." not in name
    }
    if config.vision_config.model_type != "internvl_vision":
        prefix = SIGLIP_U if family is VILA_U else ""
        shape = [config.vision_config.hidden_size]
        expected |= {f"{prefix}vision_model.post_layernorm.{kind}": shape for kind in ("weight", "bias")}
    dtype = getattr(torch, DTYPES[shards[0].dtype])
    missing = {name: torch.zeros(shape, dtype=dtype) for name, shape in expected.items() if name not in shapes}
    if family is VILA_U:
        # readers build one module for all depths, and would make up what is missing of it
        names = [CODEBOOK.format(depth) for depth in range(1, config.code_depth)]
        missing |= {name: read(shards, CODEBOOK.format(0)) for name in names if name not in shapes}
    return missing


def read(shards: list[Shard], wanted: str) -> torch.Tensor:
    """A tensor by its name in its part, in memory of its own."""
    for shard in shards:
        for stored, (_, name) in placed_names(shard).items():
            if name == wanted:
                with safe_open(shard.path, framework="pt") as file:
                    return file.get_tensor(stored)
    raise ValueError(f"the checkpoint lacks the tensor {wanted!r}")


__all__ = ["to_original"]
