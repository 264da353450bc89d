"""The one table of weight names: original checkpoints <-> this package.

The original stores three folders and knows two spellings of a weight:

    folder          name in the folder's files       name in the whole model
    llm/            model.layers.0...  lm_head...    llm.model.layers.0...  llm.lm_head...
    vision_tower/   vision_model.encoder...          vision_tower.vision_tower.vision_model.encoder...
    mm_projector/   layers.1...                      mm_projector.layers.1...

Both load. `save_pretrained` writes whole-model names; with `save_original_format=False` it writes the module names of
this package.
"""

import re
from collections.abc import Mapping

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

# folder of an original checkpoint -> prefix of its weights in the whole model
PART_PREFIXES = {"llm": "llm.", "vision_tower": "vision_tower.vision_tower.", "mm_projector": "mm_projector."}

# how the names inside a folder begin -> the same in the whole model
FOLDER_NAMES = {
    r"^model\.(embed_tokens|layers|norm)\.": r"llm.model.\1.",
    r"^(vision_model|embeddings|encoder)\.": r"vision_tower.vision_tower.\1.",
    r"^layers\.": "mm_projector.layers.",
    # of VILA-HD
    r"^(top_down_prompt_head|high_res_pos_embed|high_res_scale_embed)\b": r"mm_projector.\1",
}

# prefix in the whole model -> prefix in `VilaForConditionalGeneration`
MODULE_PREFIXES = {
    "llm.model.": "model.language_model.",
    "llm.lm_head.": "lm_head.",
    "vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "mm_projector.": "model.multi_modal_projector.",
}

# InternViT's names, which transformers' InternVL tower spells differently, below the two prefixes
INTERN_PREFIXES = (r"^vision_tower\.vision_tower\.", "model.vision_tower.")
INTERN_NAMES = {
    r"embeddings\.class_embedding": "embeddings.cls_token",
    r"embeddings\.patch_embedding\.": "embeddings.patch_embeddings.projection.",
    r"embeddings\.position_embedding": "embeddings.position_embeddings",
    r"encoder\.layers\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.projection_layer.",
    r"encoder\.layers\.(\d+)\.attn\.qkv\.": r"encoder.layer.\1.attention.qkv.",
    r"encoder\.layers\.(\d+)\.attn\.q_norm\.": r"encoder.layer.\1.attention.q_norm.",
    r"encoder\.layers\.(\d+)\.attn\.k_norm\.": r"encoder.layer.\1.attention.k_norm.",
    r"encoder\.layers\.(\d+)\.mlp\.": r"encoder.layer.\1.mlp.",
    r"encoder\.layers\.(\d+)\.norm1\.": r"encoder.layer.\1.layernorm_before.",
    r"encoder\.layers\.(\d+)\.norm2\.": r"encoder.layer.\1.layernorm_after.",
    r"encoder\.layers\.(\d+)\.ls1": r"encoder.layer.\1.lambda_1",
    r"encoder\.layers\.(\d+)\.ls2": r"encoder.layer.\1.lambda_2",
}


class LoadOnlyRenaming(WeightRenaming):
    """A spelling that is understood on load and never written."""

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("(?!)", "(?!)")


def weight_transforms() -> list[WeightRenaming | WeightConverter]:
    """The table in the form that transformers applies on load and, from its end, on save."""
    transforms: list[WeightRenaming | WeightConverter] = []
    transforms += [LoadOnlyRenaming(name, whole) for name, whole in FOLDER_NAMES.items()]
    transforms += [WeightRenaming("^" + re.escape(whole), module) for whole, module in MODULE_PREFIXES.items()]
    # behind the general tower prefix, so that on save, which goes from the end, they are applied before it
    whole, module = INTERN_PREFIXES
    transforms += [WeightRenaming(whole + old, module + new) for old, new in INTERN_NAMES.items()]
    for kind in ("weight", "bias"):
        split = [f"attention.{projection}_proj.{kind}" for projection in "qkv"]
        transforms.append(WeightConverter(f"attention.qkv.{kind}", split, operations=[Chunk(dim=0)]))
    return transforms


def original_name(name: str) -> tuple[str, str]:
    """Any spelling of a weight's name in a root shard -> `(folder, name in the folder's files)`.

    Raises:
        KeyError: if the name belongs to no part of a VILA model, or is the module name of an InternViT weight.
    """
    if ".encoder.layer." in name:
        raise KeyError(name)
    for whole, module in MODULE_PREFIXES.items():
        if name.startswith(module):
            name = whole + name.removeprefix(module)
            break
    for folder, prefix in PART_PREFIXES.items():
        if name.startswith(prefix):
            return folder, name.removeprefix(prefix)
    raise KeyError(name)


def with_module_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under whole-model names -> under the names in `VilaForConditionalGeneration`; others stay."""
    whole, module = INTERN_PREFIXES
    table = {"^" + re.escape(old): new for old, new in MODULE_PREFIXES.items()}
    table |= {whole + old: module + new for old, new in INTERN_NAMES.items()}
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        for old, new in table.items():
            name = re.sub(old, new, name)
        if ".attention.qkv." in name:
            parts = zip("qkv", tensor.chunk(3))
            renamed |= {name.replace(".qkv.", f".{projection}_proj."): part for projection, part in parts}
        else:
            renamed[name] = tensor
    return renamed


def register_weight_names(model_type: str = "vila") -> None:
    """Makes `from_pretrained` and `save_pretrained` of VILA models go through the table."""
    register_checkpoint_conversion_mapping(model_type, weight_transforms(), overwrite=True)
