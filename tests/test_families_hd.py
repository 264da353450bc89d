"""Released PS3 encoders and VILA-HD convert at their real size. The weights are holes in sparse files.

Names and shapes are those of released files, spelled out here and not asked of our own modules.
"""

import json
import shutil

import pytest
import torch
from conftest import COMMITTED_GOLDENS
from sparse import write_shards, write_sparse
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor
from vila.conversion_vila import convert

GOLDEN = COMMITTED_GOLDENS / "vila_hd" / "vila_hd_vlm" / "checkpoint"
COMMON = {
    "model_type": "ps3_vision_model", "pool": "map", "max_select_num": 2560, "separate_pos_emb": True,
    "highres_selection_feature": True, "select_based_on_layer": [0, 9, 18, 26], "hidden_size": 1152, "patch_size": 14,
    "dynamic_img_size": True, "max_select_num_each_scale": None, "radio": False, "final_norm": False,
}  # fmt: skip
SIGLIP = {**COMMON, "model_name": "vit_so400m_patch14_siglip_384", "ps3_scales": [378, 756, 1512], "image_size": 1512}
SIGLIP2_4K = {
    **COMMON,
    "model_name": "vit_so400m_patch14_siglip_378",
    "ps3_scales": [378, 756, 1512, 3780],
    "image_size": 3780,
}
RADIO_4K = {
    **COMMON, "model_name": "vit_large_patch16_224", "ps3_scales": [384, 768, 1536, 3840], "image_size": 3840,
    "hidden_size": 1024, "select_based_on_layer": [0, 7, 14, 23], "img_size": 4096, "radio": True,
    "radio_adapter_mlp_version": "v2", "radio_adapter_mlp_input_dim": 1024, "radio_adapter_mlp_hidden_dim": 1520,
    "radio_adapter_mlp_output_dim": 1152, "radio_adapter_mlp_num_inner": 3,
}  # fmt: skip
TEXT = {
    "context_length": 64, "vocab_size": 32000, "width": 1152, "heads": 16, "layers": 27,
    "mlp_ratio": 3.7362, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "output_dim": 1152, "prompt_proj_dim": 1152, "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip
# config, side of the table of positions, blocks, millions of parameters of the vision part, budget of a look
ENCODERS = {
    "PS3-1.5K-SigLIP": (SIGLIP, 27, 27, 486, [512, 2048]),
    "PS3-4K-SigLIP2": (SIGLIP2_4K, 27, 27, 576, [85, 341, 2134]),
    "PS3-4K-C-RADIOv2": (RADIO_4K, 256, 24, None, [85, 341, 2134]),
}
QWEN_7B = {
    "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
ROOT = {
    "model_type": "llava_topdown_llama", "ps3": True, "look_close_mode": "after_prompt", "num_look_close": 6,
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch", "image_aspect_ratio": "resize", "fps": 0.0,
    "mm_low_res_token_num": 729, "mm_scale_num": 4,
}  # fmt: skip


def linear(name, out, size):
    return {f"{name}.weight": [out, size], f"{name}.bias": [out]}


def norm(name, size):
    return {f"{name}.weight": [size], f"{name}.bias": [size]}


def with_prefix(prefix, *parts):
    return {f"{prefix}.{name}": shape for part in parts for name, shape in part.items()}


def selection_shapes(width, num_highres, num_layers=4, size=512):
    seen, conv = num_layers * width, "highres_selection_feature_module"
    shapes = {"prior_prompt": [width], f"{conv}.stem.0.weight": [size, 3, 28, 28], f"{conv}.stem.0.bias": [size]}
    shapes |= linear("selection_feature_proj.fc1", seen, seen) | norm("selection_feature_proj.norm", seen)
    shapes |= linear("selection_feature_proj.fc2", num_highres * width, seen) | norm(f"{conv}.stem.1", size)
    for number in range(3):
        block = f"{conv}.blocks.{number}"
        shapes |= {f"{block}.conv_dw.weight": [size, 1, 7, 7], f"{block}.conv_dw.bias": [size]}
        shapes |= {f"{block}.weight": [size]} | norm(f"{block}.norm", size)
        shapes |= linear(f"{block}.mlp.fc1", 4 * size, size) | linear(f"{block}.mlp.fc2", size, 4 * size)
    shapes |= {f"{conv}.out_proj.weight": [size, size, 1, 1], f"{conv}.out_proj.bias": [size]}
    return shapes | linear("prompt_proj_for_highres", num_highres * size, width)


def trunk_shapes(width, inter, depth, patch, grid):
    shapes = {"pos_embed": [1, grid**2, width]}
    shapes |= {"patch_embed.proj.weight": [width, 3, patch, patch], "patch_embed.proj.bias": [width]}
    for number in range(depth):
        block = f"blocks.{number}"
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", inter, width) | linear(f"{block}.mlp.fc2", width, inter)
    return shapes


def pooling_shapes(width, is_radio):
    pool = "attn_pool"
    shapes = {f"{pool}.latent": [1, 1, 1152]} | norm(f"{pool}.norm", 1152) | linear(f"{pool}.kv", 2304, 1152)
    shapes |= linear(f"{pool}.q", 1152, 1152) | linear(f"{pool}.proj", 1152, 1152)
    shapes |= linear(f"{pool}.mlp.fc1", 4304, 1152) | linear(f"{pool}.mlp.fc2", 1152, 4304)
    if not is_radio:
        return shapes | norm("norm", width)
    shapes |= linear("siglip_proj.fc1", 1520, width) | norm("siglip_proj.final.0", 1520)
    shapes |= linear("siglip_proj.final.2", 1152, 1520)
    for number in range(3):
        shapes |= norm(f"siglip_proj.blocks.{number}.0", 1520) | linear(f"siglip_proj.blocks.{number}.2", 1520, 1520)
    return shapes


def vision_shapes(tower, grid, depth):
    width, is_radio = tower["hidden_size"], tower["radio"]
    patch, inter = (16, 4096) if is_radio else (14, 4304)
    trunk = [trunk_shapes(width, inter, depth, patch, grid), pooling_shapes(width, is_radio)]
    scales = tower["ps3_scales"][1:]
    residual = {f"pos_emb_residual.{i}": [1, (scale // patch) ** 2, width] for i, scale in enumerate(scales)}
    return with_prefix("vision_model", selection_shapes(width, len(scales)), residual, with_prefix("trunk", *trunk))


def text_shapes(prompt_size):
    shapes = {"token_embedding.weight": [32000, 1152], "positional_embedding": [64, 1152]} | norm("ln_final", 1152)
    for number in range(27):
        block = f"transformer.resblocks.{number}"
        shapes |= norm(f"{block}.ln_1", 1152) | norm(f"{block}.ln_2", 1152)
        shapes |= {f"{block}.attn.in_proj_weight": [3456, 1152], f"{block}.attn.in_proj_bias": [3456]}
        shapes |= linear(f"{block}.attn.out_proj", 1152, 1152)
        shapes |= linear(f"{block}.mlp.c_fc", 4304, 1152) | linear(f"{block}.mlp.c_proj", 1152, 4304)
    shapes |= linear("text_projection", 1152, 1152) | linear("prompt_proj.fc1", 1152, 1152)
    shapes |= norm("prompt_proj.norm", 1152) | linear("prompt_proj.fc2", prompt_size, 1152)
    return with_prefix("text_model", shapes) | {"logit_scale": [], "logit_bias": []}


def preprocessor(tower):
    return {"image_size": tower["ps3_scales"][-1], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_converts_at_its_real_size(name, tmp_path):
    tower, grid, depth, millions, budget = ENCODERS[name]
    source = tmp_path / name
    source.mkdir()
    text = {**TEXT, "prompt_proj_dim": tower["hidden_size"]}
    config = {"model_type": "ps3", "vision_config": tower, "text_config": text}
    (source / "config.json").write_text(json.dumps(config))
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor(tower)))
    shapes = vision_shapes(tower, grid, depth)
    write_sparse(source / "model.safetensors", shapes | text_shapes(tower["hidden_size"]))
    target = convert(source, tmp_path / "converted")

    found = AutoConfig.from_pretrained(target)
    assert found.vision_config.look_budget == budget
    assert found.dtype == torch.bfloat16
    side = tower["ps3_scales"][-1]
    assert AutoImageProcessor.from_pretrained(target).size == {"height": side, "width": side}
    with torch.device("meta"):
        model = AutoModel.from_config(found)
    if millions is not None:
        assert round(sum(weight.numel() for weight in model.vision_model.parameters()) / 1e6) == millions


def test_vila_hd_converts_at_its_real_size(tmp_path):
    source = shutil.copytree(GOLDEN, tmp_path / "VILA-HD-8B-PS3-4K-SigLIP2")
    files = {
        "config.json": ROOT,
        "llm/config.json": QWEN_7B,
        "vision_tower/config.json": SIGLIP2_4K,
        "vision_tower/preprocessor_config.json": preprocessor(SIGLIP2_4K),
        "mm_projector/config.json": {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample"},
    }
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source / "llm"))
    shapes = {name: list(weight.shape) for name, weight in language_model.state_dict().items()}
    (source / "llm" / "model.safetensors").unlink()
    write_shards(source / "llm", shapes, 4)
    write_sparse(source / "vision_tower" / "model.safetensors", vision_shapes(SIGLIP2_4K, 27, 27))
    projector = norm("layers.1", 4608) | linear("layers.2", 3584, 4608) | linear("layers.4", 3584, 3584)
    projector |= linear("top_down_prompt_head.fc1", 2304, 3584) | norm("top_down_prompt_head.norm", 2304)
    projector |= linear("top_down_prompt_head.fc2", 1152, 2304) | {"high_res_pos_embed": [1, 729, 3584]}
    projector |= {f"high_res_scale_embed.{number}": [1, 1, 3584] for number in range(4)}
    write_sparse(source / "mm_projector" / "model.safetensors", projector)

    target = convert(source, tmp_path / "converted")
    config, processor = AutoConfig.from_pretrained(target), AutoProcessor.from_pretrained(target)
    assert config.num_tile_tokens == processor.num_tile_tokens == 196
    assert (config.num_look_close, config.look_close_mode) == (6, "after_prompt")
    assert (config.top_down_prompt_head_type, config.high_res_pos_embed) == ("mlp", True)
    assert processor.image_processor.size == {"height": 3780, "width": 3780}
