"""The table of weight names of VILA-U: original checkpoints <-> this package. See `weight_names_vila`.

    folder          name in the folder's files                  name in the whole model
    vision_tower/   rqvaesiglip...  rqtransformer...            vision_tower.vision_tower.rqvaesiglip...

The other two folders are as in VILA.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from .weight_names_vila import FOLDER_NAMES, LoadOnlyRenaming

FOLDER_NAMES_U = {
    **FOLDER_NAMES,
    r"^(rqvaesiglip|rqtransformer)\.": r"vision_tower.vision_tower.\1.",
}

TOWER = r"^vision_tower\.vision_tower\.rqvaesiglip\."
DEPTH = r"^vision_tower\.vision_tower\.rqtransformer\."
LAYER = DEPTH + r"head_transformer\.blocks\.(\d+)\."
# name in the whole model -> name in `VilaUForConditionalGeneration`
MODULE_NAMES = {
    r"^llm\.model\.": "model.language_model.",
    r"^llm\.lm_head\.": "lm_head.",
    r"^mm_projector\.": "model.multi_modal_projector.",
    TOWER + r"siglip_model\.vision_model\.": "model.vision_tower.",
    TOWER + r"quantizer\.": "model.quantizer.",
    TOWER + r"decoder\.": "model.pixel_decoder.",
    # behind the decoder: on save the table is read from its end
    TOWER + r"post_quant_conv\.": "model.pixel_decoder.post_quant_conv.",
    DEPTH + r"in_mlp_1\.": "model.depth_transformer.code_projection.",
    DEPTH + r"in_mlp_2\.": "model.depth_transformer.hidden_projection.",
    DEPTH + r"pos_emb_d": "model.depth_transformer.position_embedding",
    DEPTH + r"classifier_mlp\.layer_norm\.": "model.depth_transformer.norm.",
    DEPTH + r"classifier_mlp\.linear\.": "model.depth_transformer.head.",
    LAYER + r"ln1\.": r"model.depth_transformer.layers.\1.pre_attention_norm.",
    LAYER + r"ln2\.": r"model.depth_transformer.layers.\1.pre_mlp_norm.",
    LAYER + r"attn\.query\.": r"model.depth_transformer.layers.\1.attention.q_proj.",
    LAYER + r"attn\.key\.": r"model.depth_transformer.layers.\1.attention.k_proj.",
    LAYER + r"attn\.value\.": r"model.depth_transformer.layers.\1.attention.v_proj.",
    LAYER + r"attn\.proj\.": r"model.depth_transformer.layers.\1.attention.out_proj.",
    LAYER + r"mlp\.": r"model.depth_transformer.layers.\1.mlp.",
}

# of the original tower, without a use: its text side, its scores of text against pictures, statistics of training
UNUSED = (
    r"\.siglip_model\.text_model\.",
    r"\.logit_(scale|bias)$",
    r"\.cluster_size_ema$",
    r"\.embed_ema$",
)
# all depths of a shared codebook are on disk, and the same
UNUSED_CODEBOOKS = r"\.codebooks\.[1-9]\d*\."


def unused_names(config: Any) -> list[str]:
    """Patterns of the names in an original that a model of this config has no place for."""
    return [*UNUSED, *([UNUSED_CODEBOOKS] if config.shared_codebook else [])]


def with_module_names_u(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under whole-model names -> under those in `VilaUForConditionalGeneration`; others stay."""
    renamed = {}
    for name, tensor in state_dict.items():
        for old, new in MODULE_NAMES.items():
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return renamed


def register_weight_names_u() -> None:
    """Makes `from_pretrained` and `save_pretrained` of VILA-U models go through the table."""
    transforms: list[WeightRenaming | WeightConverter] = [
        *(LoadOnlyRenaming(name, whole) for name, whole in FOLDER_NAMES_U.items()),
        *(WeightRenaming(whole, module) for whole, module in MODULE_NAMES.items()),
    ]
    register_checkpoint_conversion_mapping("vila_u", transforms, overwrite=True)
