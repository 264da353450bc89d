"""VILA-U: conversion and saving, the ways in, the release at its real size."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from chat_requests import noise_picture
from conftest import REPOSITORY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparse import write_shards, write_sparse
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    SiglipConfig,
    SiglipModel,
)
from vila import VilaUConfig
from vila.conversion_vila import convert
from vila.int4_linear_vila import Int4Linear
from vila.original_config_vila_u import SIGLIP_CONFIGS, siglip_config
from vila.quantize.checkpoint import quantize
from vila.quantize.options import Options
from vila_u_requests import CASE, PROMPTS, draw
from without_package import WITHOUT_PACKAGE


@pytest.fixture
def folder(vila_u_folder):
    return vila_u_folder


@pytest.fixture
def model(vila_u_model):
    return vila_u_model


@pytest.fixture
def processor(vila_u_processor):
    return vila_u_processor


# --------------------------------------------------------------------------------------------- conversion and saving


def test_conversion_names_only_what_is_loaded(folder):
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(CASE.folder / "checkpoint" / "vision_tower" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    left_out = stored - set(names)
    assert any("text_model" in name for name in left_out)
    assert {name for name in names if "codebooks" in name} == {"rqvaesiglip.quantizer.codebooks.0.weight"}
    assert not [name for name in names if "ema" in name or "logit_" in name]
    assert (folder / "vision_tower-model.safetensors").is_symlink()


def test_nothing_is_missing_or_unexpected(folder):
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


PARTS = ("vision_tower", "language_model", "quantizer", "depth_transformer", "pixel_decoder")


@pytest.mark.parametrize("offloaded", PARTS)
def test_part_that_lies_on_disk_changes_nothing(folder, model, processor, tmp_path, offloaded):
    places = dict.fromkeys([f"model.{part}" for part in (*PARTS, "multi_modal_projector")] + ["lm_head"], "cpu")
    places[f"model.{offloaded}"] = "disk"
    spread = AutoModel.from_pretrained(folder, dtype="float32", device_map=places, offload_folder=tmp_path)
    output = draw(spread, processor, PROMPTS[:1])
    assert torch.equal(output.sequences, draw(model, processor, PROMPTS[:1]).sequences)
    pixels = processor.image_processor(noise_picture(1), return_tensors="pt")["pixel_values"]
    assert torch.equal(spread.encode_image(pixels), model.encode_image(pixels))


def test_layers_behind_the_selected_one_are_not_built(model):
    assert len(model.model.vision_tower.encoder.layers) == model.config.vision_config.num_hidden_layers - 1


def test_copy_is_self_contained_and_without_what_is_not_used(tmp_path, model):
    target = convert(CASE.folder / "checkpoint", tmp_path / "copied_u", copy=True)
    stored = {name for file in target.glob("*.safetensors") for name in load_file(file)}
    assert not [name for name in stored if "text_model" in name or "ema" in name or "codebooks.1" in name]
    copied = AutoModel.from_pretrained(target, dtype="float32")
    for name, weight in model.state_dict().items():
        assert torch.equal(copied.state_dict()[name], weight), name


@pytest.mark.parametrize("original_names", [True, False])
def test_saved_model_loads_and_has_the_originals_names(model, processor, tmp_path, original_names):
    target = tmp_path / f"saved_u_{original_names}"
    model.save_pretrained(target, save_original_format=original_names)
    processor.save_pretrained(target)
    loaded = AutoModel.from_pretrained(target, dtype="float32")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    stored = load_file(target / "model.safetensors")
    model.load_state_dict(stored)  # as Trainer does it
    if original_names:
        parts = {"llm": "llm.", "vision_tower": "vision_tower.vision_tower.", "mm_projector": "mm_projector."}
        original = {
            prefix + name
            for part, prefix in parts.items()
            for name in load_file(CASE.folder / "checkpoint" / part / "model.safetensors")
        }
        assert set(stored) - {"lm_head.weight"} <= original  # the same in both spellings
    assert draw(loaded, AutoProcessor.from_pretrained(target), PROMPTS[:1]).sequences.shape == (1, 64, 4)


def test_conversion_in_place_links_nothing_and_copies_nothing(tmp_path):
    source = shutil.copytree(CASE.folder / "checkpoint", tmp_path / "in_place_u")
    weights = {path: path.stat().st_ino for path in source.rglob("*.safetensors")}
    assert convert(source, in_place=True) == source
    assert {path: path.stat().st_ino for path in source.rglob("*.safetensors")} == weights
    _, info = AutoModel.from_pretrained(source, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((source / "original_files" / "config.json").read_text())["model_type"] == "vila_u_llama"


def test_int4_language_model_draws_and_the_rest_is_left_alone(folder, model, processor, tmp_path):
    small = quantize(folder, tmp_path / "int4_u", Options(method="rtn", group_size=32, head_bits=16))
    loaded = AutoModel.from_pretrained(small, dtype="bfloat16")
    parts = {name.split(".")[1] for name, module in loaded.named_modules() if isinstance(module, Int4Linear)}
    assert parts == {"language_model"}
    depth = loaded.model.depth_transformer.head.weight
    assert torch.equal(depth, model.model.depth_transformer.head.weight.bfloat16())
    assert draw(loaded, AutoProcessor.from_pretrained(small), PROMPTS[:1]).pixel_values.isfinite().all()


def edited(tmp_path, file, change):
    """A copy of the original with one JSON file changed."""
    source = tmp_path / "original_u"
    shutil.copytree(CASE.folder / "checkpoint", source)
    path = source / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return source


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


TOWER = "vision_tower/config.json"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", put("image_aspect_ratio", value="anyres"), "image_aspect_ratio"),
        ("llm/config.json", put("model_type", value="gpt2"), "model_type"),
        (TOWER, put("rqvaesiglip", value=None), "rqvaesiglip is missing"),
        (TOWER, lambda content: content["rqvaesiglip"].pop("n_embed"), "n_embed"),
        (TOWER, put("rqvaesiglip", "n_embed", value=65), "shape"),
        (TOWER, put("rqvaesiglip", "n_embed", value="many"), "codebook_size"),
        (TOWER, put("rqvaesiglip", "code_shape", value=[4, 4, 4]), "code_shape"),
        (TOWER, put("rqvaesiglip", "pretrained_model", value="google/siglip2"), "pretrained_model"),
        (TOWER, put("rqvaesiglip", "shared_codebook", value=False), None),
        (TOWER, put("rqvaesiglip", "ddconfig", "ch", value=33), "decoder_channels"),
        (TOWER, put("rqtransformer", "head", "block", "n_head", value=5), "depth_num_heads"),
        (TOWER, put("rqtransformer", "head", "n_layer", value=10**9), "depth_num_layers"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_checkpoints_without_sense_are_refused_by_name(tmp_path, file, change, message):
    source = edited(tmp_path, file, change)
    if message is None:
        unshared = AutoModel.from_pretrained(convert(source, tmp_path / "unshared_u"), dtype="float32")
        assert len(unshared.model.quantizer.codebooks) == 4
        return
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_missing_weight_is_named(tmp_path):
    source = tmp_path / "original_u"
    shutil.copytree(CASE.folder / "checkpoint", source)
    file = source / "vision_tower" / "model.safetensors"
    weights = load_file(file)
    del weights["rqtransformer.pos_emb_d"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="position_embedding"):
        convert(source, tmp_path / "target")


@pytest.mark.parametrize("name", ["google/siglip-large-patch16-256", "google/siglip-so400m-patch14-384"])
def test_released_towers_are_known_without_a_download(name, tmp_path):
    config = VilaUConfig(vision_config=siglip_config(name, tmp_path))
    assert config.code_grid == {"large": (16, 16), "so400m": (27, 27)}[name.split("-")[1]]


def test_other_templates_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vicuna_v1"):
        convert(CASE.folder / "checkpoint", tmp_path / "target", conv_mode="qwen2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size"),
        ({"code_depth": 65}, "code_depth"),
        ({"depth_dropout": 1.0}, "depth_dropout"),
        ({"depth_dropout": math.nan}, "depth_dropout"),
        ({"decoder_latent_shape": [6]}, "decoder_latent_shape"),
        ({"decoder_latent_shape": [10**6, 10**6]}, "decoder_latent_shape"),
        ({"decoder_num_res_blocks": 10**6}, "decoder_num_res_blocks"),
        ({"decoder_channel_multipliers": []}, "decoder_channel_multipliers"),
        ({"projector_type": "mlp_downsample"}, "downsampling"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "SigLIP"),
        ({"video_pool_sizes": [[8, 1, 1]]}, "pooling"),
    ],
    ids=str,
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VilaUConfig(**options)


# ------------------------------------------------------------------------------------------------------- the ways in

DRAW = """
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32")
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(text=["A snowy mountain."], generation_mode="image", return_tensors="pt")
drawn = model.generate(**inputs, generation_mode="image", do_sample=False)
processor.post_process_multimodal_output(drawn.pixel_values, generation_mode="image")[0].save(sys.argv[2])
"""


def test_code_beside_the_weights_draws_without_the_package(folder, tmp_path, model, processor):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE + DRAW, str(folder), str(tmp_path / "drawn.png")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    output = draw(model, processor, ["A snowy mountain."])
    (picture,) = processor.post_process_multimodal_output(output.pixel_values, generation_mode="image")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "drawn.png")), np.asarray(picture))


def test_command_draws_pictures_and_videos_from_an_original(tmp_path, capsys, monkeypatch):
    from vila import loading_vila
    from vila.infer import main

    monkeypatch.setattr(loading_vila, "HF_HOME", str(tmp_path / "hf"))
    common = ["--model_path", str(CASE.folder / "checkpoint"), "--save_path", str(tmp_path / "out"), "--device", "cpu"]
    prompt = ["--prompt", "A snowy mountain.", "--dtype", "float32", "--temperature", "0", "--cfg", "3.0"]
    main([*common, *prompt, "--generation_nums", "2", "--video_generation", "False"])
    lines = capsys.readouterr().out.split()
    assert lines == [str(tmp_path / "out" / f"image_{number}.png") for number in range(2)]
    expected = CASE.tensors["pixels_0_255"][0].round().permute(1, 2, 0).numpy()
    drawn = np.asarray(Image.open(lines[1])).astype(float)
    assert np.abs(drawn - expected).max() <= 1
    main([*common, *prompt, "--video_generation", "True", "-nf", "2"])
    (line,) = capsys.readouterr().out.split()
    with av.open(line) as container:
        assert len(list(container.decode(video=0))) == 2
    noise_picture(1).save(tmp_path / "photo.png")
    main([*common[:2], "--image_path", str(tmp_path / "photo.png"), "--query", "What?", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    "arguments",
    [["--prompt", "a", "--query", "b"], ["--prompt", "a", "--cfg", "0"], ["--prompt", "a", "--cfg", "nan"],
     ["--prompt", "a", "--generation_nums", "0"], ["--prompt", "a", "--video_generation", "maybe"]],
    ids=str,
)  # fmt: skip
def test_command_refuses_what_makes_no_sense(arguments, capsys):
    from vila.infer import main

    with pytest.raises(SystemExit) as error:
        main(["--model_path", "nowhere", *arguments])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_command_says_which_checkpoints_cannot_draw(converted):
    from vila.infer import main

    with pytest.raises(SystemExit, match="cannot draw"):
        main(["--model_path", str(converted("nvila_lite_image")), "--prompt", "a"])


# ------------------------------------------------------------------------------------------------------- the real size

# sizes of vila-u-7b-256, as far as they are known
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32004, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_scaling": {"type": "linear", "factor": 2.0},
}  # fmt: skip
TOWER_7B = {
    "model_type": "rqvaesigliptransformer_model",
    "hidden_size": 1024,
    "rqvaesiglip": {
        "n_embed": 16384, "embed_dim": 1024, "code_shape": [16, 16, 4], "latent_shape": [16, 16, 1024],
        "shared_codebook": True, "decoder_latent_shape": None, "pretrained_model": "google/siglip-large-patch16-256",
        "ddconfig": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16],
                     "resolution": 256, "z_channels": 256, "out_ch": 3},
    },
    "rqtransformer": {"embed_dim": 2560, "head": {"n_layer": 6, "block": {"n_head": 40}}, "vocab_size": 16384},
}  # fmt: skip
SPELLINGS = {
    "code_projection": "in_mlp_1", "hidden_projection": "in_mlp_2", "position_embedding": "pos_emb_d",
    "layers": "head_transformer.blocks", "pre_attention_norm": "ln1", "pre_mlp_norm": "ln2", "attention": "attn",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "proj", "norm": "classifier_mlp.layer_norm",
    "head": "classifier_mlp.linear",
}  # fmt: skip


def shapes_of(module, prefix=""):
    return {prefix + name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def released_tower():
    """Names and shapes in the tower's file of the release."""
    from vila.codes_vila_u import VilaUPixelDecoder
    from vila.depth_transformer_vila_u import VilaUDepthTransformer

    siglip = SIGLIP_CONFIGS["google/siglip-large-patch16-256"]
    with torch.device("meta"):
        config = VilaUConfig(vision_config=siglip_config("google/siglip-large-patch16-256", Path()))
        whole = SiglipModel(SiglipConfig(vision_config=siglip, text_config={**siglip, "vocab_size": 32000}))
        shapes = shapes_of(whole, "rqvaesiglip.siglip_model.")
        for name, shape in shapes_of(VilaUPixelDecoder(config)).items():
            shapes["rqvaesiglip." + ("" if name.startswith("post_quant") else "decoder.") + name] = shape
        for name, shape in shapes_of(VilaUDepthTransformer(config)).items():
            shapes["rqtransformer." + ".".join(SPELLINGS.get(part, part) for part in name.split("."))] = shape
    for depth in range(4):
        book = f"rqvaesiglip.quantizer.codebooks.{depth}."
        shapes |= {
            book + "weight": [16385, 1024],
            book + "embed_ema": [16384, 1024],
            book + "cluster_size_ema": [16384],
        }
    return shapes | {"rqvaesiglip.logit_scale": [1], "rqvaesiglip.logit_bias": [1]}


def test_release_converts_at_its_real_size(tmp_path):
    source = shutil.copytree(CASE.folder / "checkpoint", tmp_path / "vila-u-7b-256")
    tower = released_tower()
    # what is known of the released file
    assert len(tower) == 1107
    assert abs(2 * sum(math.prod(shape) for shape in tower.values()) / 1e9 - 2.7126) < 0.001
    for part, config in (("llm", LLAMA_7B), ("vision_tower", TOWER_7B)):
        (source / part / "config.json").write_text(json.dumps(config))
        (source / part / "model.safetensors").unlink()
    with torch.device("meta"):
        llm = shapes_of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source / "llm")))
    write_shards(source / "llm", llm, 3)
    write_sparse(source / "vision_tower" / "model.safetensors", tower)
    projector = {"layers.0.weight": [4096, 1024], "layers.0.bias": [4096]}
    projector |= {"layers.2.weight": [4096, 4096], "layers.2.bias": [4096]}
    write_sparse(source / "mm_projector" / "model.safetensors", projector)
    target = convert(source, tmp_path / "converted_7b_u")
    config, processor = AutoConfig.from_pretrained(target), AutoProcessor.from_pretrained(target)
    assert config.num_tile_tokens == processor.num_tile_tokens == 256
    assert (config.code_depth, config.codebook_size) == (4, 16384)
    drawing = json.loads((target / "generation_config.json").read_text())["drawing"]
    assert drawing["top_k"] == 900
    named = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    # the text tower, three codebooks and the statistics: about a quarter of the tower's numbers
    assert sum(math.prod(shape) for name, shape in tower.items() if name not in named) > 3.9e8


def test_readme_draws(model, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (REPOSITORY / "README.md").read_text().split("\n## Draw\n")[1].split("\n## ")[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {"model": model, "processor": processor}
    exec(snippet.replace("num_frames=8", "num_frames=2"), names)
    assert len(names["pictures"]) == 8 and len(names["frames"]) == 2
    assert (tmp_path / "fireworks.mp4").stat().st_size
