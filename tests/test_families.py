"""Every released family converts at its real size: names, shapes, token counts. The weights are holes in sparse files.

Configs are those of the release as far as they are known; tokenizers are the tiny ones of the golden cases.
"""

import json
import shutil

import pytest
import torch
from conftest import COMMITTED_GOLDENS, REPOSITORY
from sparse import write_shards, write_sparse
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
from vila import VilaConfig
from vila.conversion_vila import convert
from vila.original_config_vila import to_vila_config
from vila.vision_vila import VilaMultiModalProjector

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}


def sizes(hidden, inter, layers, heads, kv, vocab):
    return {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


SHEARED = {**LLAMA, **sizes(2560, 6912, 32, 20, 20, 32000)}
LLAMA3_8B = {**LLAMA, **sizes(4096, 14336, 32, 32, 8, 128256), "rope_theta": 5e5}
VICUNA_13B = {**LLAMA, **sizes(5120, 13824, 40, 40, 40, 32000)}
VICUNA_7B = {**LLAMA, **sizes(4096, 11008, 32, 32, 32, 32000)}
YI_34B = {**LLAMA, **sizes(7168, 20480, 60, 56, 8, 64000), "rope_theta": 5e6}
QWEN_7B = {**QWEN, **sizes(3584, 18944, 28, 28, 4, 151648)}
QWEN_14B = {**QWEN, **sizes(5120, 13824, 48, 40, 8, 151648)}
QWEN_1B = {**QWEN, **sizes(1536, 8960, 28, 12, 2, 151651), "tie_word_embeddings": True}
LONG_7B = {**QWEN_7B, "rope_theta": 3580165449.0, "max_position_embeddings": 1048576, "vocab_size": 151651}

SIGLIP_SIZES = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
SIGLIP = {"model_type": "siglip_vision_model", **SIGLIP_SIZES, "patch_size": 14}
SIGLIP_384, SIGLIP_448 = {**SIGLIP, "image_size": 384}, {**SIGLIP, "image_size": 448, "vision_use_head": False}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "patch_size": 14, "image_size": 336,
}  # fmt: skip
INTERN = {
    "model_type": "intern_vit_6b", "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25,
    "intermediate_size": 12800, "patch_size": 14, "image_size": 448, "qk_normalization": True, "qkv_bias": False,
}  # fmt: skip

VILA15 = {"image_aspect_ratio": "resize", "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch"}
NVILA = {**VILA15, "fps": 0.0}
S2 = {"s2": True, "s2_scales": "384,768", "s2_max_split_size": 384}
DYNAMIC_S2 = {
    "image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "448,896,1344", "s2_max_split_size": 448,
    "s2_resize_output_to_scale_idx": -1,
}  # fmt: skip
TSP = {"video_encoder": json.dumps({"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]})}
TIMES = {"num_time_tokens": 100, "time_token_format": "<t{t}>", "num_video_frames": 256}

PAD = {**VILA15, "image_aspect_ratio": "pad", "mm_vision_select_feature": "patch"}
INTERN_LAST = {"mm_vision_select_layer": -1, "image_aspect_ratio": "resize"}
TILES = {**NVILA, "image_aspect_ratio": "dynamic"}
VIDEO = {**NVILA, **TSP, **TIMES}
LONG = {**NVILA, "num_video_frames": 2048}

# name: (language model, tower, projector, root config, rows of one tile, golden case whose tokenizer is used)
FAMILIES = {
    "VILA1.5-3b": (SHEARED, SIGLIP_384, "mlp_downsample", VILA15, 196, "vila15_image"),
    "VILA1.5-3b-s2": (SHEARED, SIGLIP_384, "mlp_downsample", {**VILA15, **S2}, 196, "vila15_s2_image"),
    "Llama-3-VILA1.5-8B": (LLAMA3_8B, SIGLIP_384, "mlp_downsample", VILA15, 196, "vila15_llama3_image"),
    "VILA1.5-13b": (VICUNA_13B, SIGLIP_384, "mlp_downsample", VILA15, 196, "vila15_image"),
    "VILA1.5-40b": (YI_34B, INTERN, "mlp_downsample", INTERN_LAST, 256, "vila15_intern_image"),
    "VILA-7b": (VICUNA_7B, CLIP, "mlp2x_gelu", PAD, 576, "vila15_clip_image"),
    "NVILA-8B": (QWEN_7B, SIGLIP_448, "mlp_downsample", {**NVILA, **DYNAMIC_S2}, 256, "nvila_dynamic_s2_image"),
    "NVILA-15B": (QWEN_14B, SIGLIP_448, "mlp_downsample", {**NVILA, **DYNAMIC_S2}, 256, "nvila_dynamic_s2_image"),
    "NVILA-Lite-2B": (QWEN_1B, SIGLIP_448, "mlp_downsample_3x3_fix", TILES, 121, "nvila_lite_image"),
    "NVILA-Lite-8B": (QWEN_7B, SIGLIP_448, "mlp_downsample_3x3_fix", TILES, 121, "nvila_lite_image"),
    "NVILA-8B-Video": (QWEN_7B, SIGLIP_448, "mlp_downsample_2x2_fix", VIDEO, 256, "nvila_lite_image"),
    "LongVILA-7B-1M": (LONG_7B, SIGLIP_448, "mlp_downsample", LONG, 256, "nvila_lite_image"),
}  # fmt: skip


def shapes_of(module, prefix=""):
    return {prefix + name: list(weight.shape) for name, weight in module.state_dict().items()}


def intern_shapes(tower):
    """InternViT in the names of its own files."""
    width, inter = tower["hidden_size"], tower["intermediate_size"]
    positions = (tower["image_size"] // tower["patch_size"]) ** 2 + 1
    shapes = {
        "embeddings.class_embedding": [1, 1, width],
        "embeddings.patch_embedding.weight": [width, 3, 14, 14],
        "embeddings.patch_embedding.bias": [width],
        "embeddings.position_embedding": [1, positions, width],
    }
    layer = {
        "attn.qkv.weight": [3 * width, width], "attn.q_norm.weight": [width], "attn.k_norm.weight": [width],
        "attn.proj.weight": [width, width], "attn.proj.bias": [width], "mlp.fc1.weight": [inter, width],
        "mlp.fc1.bias": [inter], "mlp.fc2.weight": [width, inter], "mlp.fc2.bias": [width], "norm1.weight": [width],
        "norm2.weight": [width], "ls1": [width], "ls2": [width],
    }  # fmt: skip
    layers = range(tower["num_hidden_layers"])
    return shapes | {f"encoder.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}


@pytest.fixture
def source(request, tmp_path):
    llm, tower, projector, root, _, tokenizer_of = FAMILIES[request.param]
    folder = shutil.copytree(COMMITTED_GOLDENS / "vila" / tokenizer_of / "checkpoint", tmp_path / request.param)
    side = tower["image_size"]
    preprocessor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}
    if tower["model_type"] != "siglip_vision_model":
        preprocessor = {"size": side, "crop_size": side} if tower is CLIP else {"resize_size": side}
    files = {
        "config.json": {"model_type": "llava_llama", **root},
        "llm/config.json": llm,
        "vision_tower/config.json": tower,
        "vision_tower/preprocessor_config.json": preprocessor,
        "mm_projector/config.json": {"mm_projector_type": projector},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    config = to_vila_config(root, llm, tower, {"mm_projector_type": projector}, image_token_id=1, video_token_id=2)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "llm"))
        parts = {"llm": shapes_of(language_model), "mm_projector": shapes_of(VilaMultiModalProjector(config))}
        if tower is INTERN:
            parts["vision_tower"] = intern_shapes(tower)
        else:
            parts["vision_tower"] = shapes_of(AutoModel.from_config(config.vision_config), "vision_model.")
    if llm.get("tie_word_embeddings"):
        del parts["llm"]["lm_head.weight"]
    (folder / "llm" / "model.safetensors").unlink()
    write_shards(folder / "llm", parts.pop("llm"), 8)
    for part, shapes in parts.items():
        write_sparse(folder / part / "model.safetensors", shapes)
    return folder


@pytest.mark.parametrize(("source", "name"), [(name, name) for name in FAMILIES], indirect=["source"], ids=FAMILIES)
def test_family_converts_at_its_real_size(source, name, tmp_path):
    llm, tower, _, root, rows, _ = FAMILIES[name]
    target = convert(source, tmp_path / "converted")
    config, processor = VilaConfig.from_pretrained(target), AutoProcessor.from_pretrained(target)
    assert config.num_tile_tokens == processor.num_tile_tokens == rows
    assert config.dtype == torch.bfloat16
    assert config.text_config.rope_parameters["rope_theta"] == llm.get("rope_theta", 10000.0)
    assert config.text_config.max_position_embeddings == llm.get("max_position_embeddings", 2048)
    assert processor.num_video_frames == root.get("num_video_frames", 8)
    assert processor.video_as_images == ("video_encoder" not in root)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    used = len(next(layers for layers in model.model.vision_tower.encoder.children()))
    assert used == tower["num_hidden_layers"] + 1 + root.get("mm_vision_select_layer", -2)


@pytest.mark.parametrize("name", FAMILIES)
def test_readme_says_what_a_family_takes(name, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from memory import row

    assert row(name) in (REPOSITORY / "README.md").read_text().splitlines()
