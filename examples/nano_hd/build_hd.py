"""An untrained vila-hd-nano as an ordinary folder: a VILA-HD in small that starts from vila-nano.

- The encoder sees 252 pixels a side of a canvas of 1512, and looks at 324 of the 7,056 patches of the large one.
- Blocks, projector and language model are vila-nano's. Its kernel of 11 pixels is stretched to 18, so that a print of
  the same height in patches gives the same features.
- Its positions come twice: stretched over the whole table, which is what the low-resolution view keeps of it, and
  repeated over and over, which tells patches of the large canvas from their neighbours.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

import torch
import torch.nn.functional as F
from canvases import CELL, CODE_LENGTH, SIDE
from transformers import AutoModel, AutoProcessor, GenerationConfig, PreTrainedTokenizerBase
from vila import (
    VilaForConditionalGeneration,
    VilaHDConfig,
    VilaHDForConditionalGeneration,
    VilaHDProcessor,
    VilaImageProcessor,
)
from vila.chat_templates_vila import user_end_ids
from vila.families_vila import VILA_HD

NANO = Path(__file__).resolve().parents[2] / "checkpoints" / "vila-nano"
PATCH, LOW_SIDE = 18, 252
LOOK_CELLS = 9  # low-resolution patches whose places one look takes
PATCHES_PER_CELL = (CELL // PATCH) ** 2
POSITION_GRID = SIDE // PATCH // 2  # a table of every second patch
MAX_NEW_TOKENS = 2 * CODE_LENGTH + 4
CHUNK = 4  # large pictures that are encoded at once


def build_config(nano: Any, tokenizer: PreTrainedTokenizerBase) -> VilaHDConfig:
    vision, text = nano.vision_config, nano.text_config.to_dict()
    config = VilaHDConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "patch_size": PATCH,
            "position_grid": POSITION_GRID,
            "ps3_scales": [LOW_SIDE, SIDE],
            "select_based_on_layer": [vision.num_hidden_layers - 1],
            "max_select_num": LOOK_CELLS * PATCHES_PER_CELL,
            "separate_pos_emb": False,
            "highres_selection_module_hidden_dim": 32,
            "highres_selection_module_out_dim": 32,
            "highres_selection_module_depth": 2,
            "pooling_size": 0,
        },
        text_config=text,
        image_token_id=nano.image_token_id,
        video_token_id=nano.video_token_id,
        projector_type=nano.projector_type,
        vision_feature_layer=-1,
        vision_chunk_size=CHUNK,
        look_close_mode="after_prompt",
        num_look_close=1,
        top_down_prompt_head_type="mlp",
        high_res_pos_embed=True,
        user_end_ids=user_end_ids(str(tokenizer.chat_template), tokenizer),
    )
    config.architectures, config.auto_map = ["VilaHDForConditionalGeneration"], VILA_HD.auto_map
    return config


def build_processor(nano: Any, config: VilaHDConfig) -> VilaHDProcessor:
    """Args: nano: vila-nano's processor."""
    image_processor = VilaImageProcessor(
        image_mode="resize",
        size={"height": SIDE, "width": SIDE},
        image_mean=list(nano.image_processor.image_mean),
        image_std=list(nano.image_processor.image_std),
    )
    return VilaHDProcessor(
        image_processor,
        nano.tokenizer,
        chat_template=nano.chat_template,
        num_tile_tokens=config.num_tile_tokens,
        video_as_images=True,
    )


def stretch_kernel(kernel: torch.Tensor, side: int) -> torch.Tensor:
    """`(D, 3, p, p) -> (D, 3, side, side)`: the kernel that answers to an enlarged patch as the old one to the patch
    itself (FlexiViT §3.4)."""
    small = kernel.shape[-1]
    each = torch.eye(small**2).unflatten(1, (1, small, small))
    enlarge = F.interpolate(each, size=(side, side), mode="bicubic").flatten(1)  # (small^2, side^2)
    return (kernel.flatten(2) @ torch.linalg.pinv(enlarge).T).unflatten(2, (side, side))


def spread_positions(table: torch.Tensor, side: int, patches_per_row: int) -> torch.Tensor:
    """`(old^2, D) -> (1, side^2, D)`: stretched over the grid, and repeated at the pace of the patches' neighbours.

    Args:
        patches_per_row: patches of the large canvas per row of the new table.
    """
    old = int(len(table) ** 0.5)
    maps = table.T.unflatten(1, (old, old))[None]
    whole = F.interpolate(maps, size=(side, side), mode="bicubic", antialias=True)
    small = F.interpolate(maps, size=old // patches_per_row, mode="bicubic", antialias=True)
    times = -(-side // small.shape[-1])
    repeated = (small - small.mean((2, 3), keepdim=True)).repeat(1, 1, times, times)[..., :side, :side]
    return (whole + repeated).flatten(2).transpose(1, 2)


@torch.no_grad()
def start_from(model: VilaHDForConditionalGeneration, nano: VilaForConditionalGeneration) -> None:
    """Puts vila-nano's weights where they belong; what it has not keeps its random start."""
    trunk, tower = model.model.vision_tower.trunk, nano.model.vision_tower
    kernel = tower.embeddings.patch_embedding
    trunk.patch_embed.proj.weight.copy_(stretch_kernel(kernel.weight, PATCH))
    trunk.patch_embed.proj.bias.copy_(kernel.bias)
    positions = spread_positions(tower.embeddings.position_embedding.weight, POSITION_GRID, 2)
    trunk.pos_embed.copy_(positions)
    for block, layer in zip(trunk.blocks, tower.encoder.layers):
        attention = layer.self_attn
        for name in ("weight", "bias"):
            each = [getattr(part, name) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            getattr(block.attn.qkv, name).copy_(torch.cat(each))
        block.attn.proj.load_state_dict(attention.out_proj.state_dict())
        block.norm1.load_state_dict(layer.layer_norm1.state_dict())
        block.norm2.load_state_dict(layer.layer_norm2.state_dict())
        block.mlp.fc1.load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp.fc2.load_state_dict(layer.mlp.fc2.state_dict())
    model.model.multi_modal_projector.layers.load_state_dict(nano.model.multi_modal_projector.layers.state_dict())
    model.model.language_model.load_state_dict(nano.model.language_model.state_dict())


def build_model(
    config: VilaHDConfig, nano: VilaForConditionalGeneration, seed: int = 0
) -> VilaHDForConditionalGeneration:
    """What vila-nano does not have is random, the same for the same seed."""
    torch.manual_seed(seed)
    model = VilaHDForConditionalGeneration(config)
    start_from(model, nano)
    # the shallow net first learns where any print is; what a question says may change that afterwards
    torch.nn.init.zeros_(model.model.vision_tower.prompt_proj_for_highres.weight)
    tokens = {"eos_token_id": config.text_config.eos_token_id, "pad_token_id": config.text_config.pad_token_id}
    media = [config.image_token_id, config.video_token_id]
    model.generation_config = GenerationConfig(**tokens, max_new_tokens=MAX_NEW_TOKENS, suppress_tokens=media)
    return model


def save(model: Any, processor: Any, folder: Path, dtype: torch.dtype) -> None:
    """An ordinary folder, with the modules that `auto_map` reaches."""
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    VILA_HD.copy_code(folder)


def build(folder: str | Path, seed: int = 0, start: str | Path = NANO) -> Path:
    """Writes a model that is not trained on canvases yet, in float32.

    Args:
        start: folder of a vila-nano.
    """
    nano, nano_processor = AutoModel.from_pretrained(start, dtype="float32"), AutoProcessor.from_pretrained(start)
    config = build_config(nano.config, nano_processor.tokenizer)
    save(build_model(config, nano, seed), build_processor(nano_processor, config), Path(folder), torch.float32)
    return Path(folder)
