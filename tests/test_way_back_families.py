"""`vila-convert --to-original` of VILA-U and VILA-HD: the original's weights and options, however it was saved."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import COMMITTED_GOLDENS
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from vila.configuration_ps3 import Ps3VisionConfig
from vila.configuration_vila_u import VilaUConfig
from vila.conversion_vila import convert, main, to_original
from vila.image_processing_vila import VilaImageProcessor
from vila.original_config_vila_hd import TRUNKS, to_original_ps3_tower, to_ps3_vision_config
from vila.original_config_vila_u import SIGLIP_CONFIGS, siglip_config, to_original_u_configs

SOURCES = {
    "vila_u": COMMITTED_GOLDENS / "vila_u" / "image_generation" / "checkpoint",
    "vila_hd": COMMITTED_GOLDENS / "vila_hd" / "vila_hd_vlm" / "checkpoint",
}
PARTS = ("llm", "vision_tower", "mm_projector")
# of a model that was saved: what it has no place for, and what stands in for layers that it does not build
NOT_SAVED = ("text_model.", "logit_", "_ema", ".head.", "trunk.attn_pool.", "trunk.norm.")
MADE_UP = ("vision_model.encoder.layers.2.", "post_layernorm")
# of a training run or of a release of transformers
RUN = {
    "_name_or_path", "drop_path_rate", "model_dtype", "resume_path", "transformers_version", "tune_language_model",
    "tune_mm_projector", "tune_vision_tower", "_attn_implementation_autoset", "s2_resize_output_to_scale_idx",
}  # fmt: skip


@pytest.fixture(scope="module", params=SOURCES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def original(family):
    return SOURCES[family]


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    return convert(original, tmp_path_factory.mktemp("way_back") / "new")


@pytest.fixture(scope="module")
def back(folder, tmp_path_factory):
    return to_original(folder, tmp_path_factory.mktemp("way_back") / "back")


def tensors(folder, part):
    return load_file(folder / part / "model.safetensors")


def save(folder, target, **options):
    """As a fine-tuned model is saved; the sentencepiece model is put beside it."""
    AutoModel.from_pretrained(folder, dtype="auto").save_pretrained(target, **options)
    AutoProcessor.from_pretrained(folder).save_pretrained(target)
    if (folder / "tokenizer.model").is_file():
        shutil.copy(folder / "tokenizer.model", target)
    return target


def test_weights_are_those_of_the_original(original, back):
    for part in PARTS:
        expected, restored = tensors(original, part), tensors(back, part)
        assert set(restored) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(restored[name], tensor), name


def test_it_converts_again_to_the_same(folder, back, tmp_path):
    again = convert(back, tmp_path / "again")
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"):
        assert (again / name).read_text() == (folder / name).read_text(), name
    weights = AutoModel.from_pretrained(again, dtype="auto").state_dict()
    for name, tensor in AutoModel.from_pretrained(folder, dtype="auto").state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("part", ["", *PARTS])
def test_options_are_those_of_the_original(original, back, part):
    expected, restored = (json.loads((place / part / "config.json").read_text()) for place in (original, back))
    generic = {"model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side", "drop", "pretrained"}
    named = {"model_name", "vision_tower_name", "trunk_args"}  # of a trunk that no release has
    for key, value in expected.items():
        if key in RUN | generic | named or key.endswith("_cfg") or value is None:
            continue
        if part == "llm" and key not in restored:
            continue  # what a config of transformers 4 says of every model
        assert restored.get(key) == value, key


def test_tokenizer_has_the_ids_of_the_original(original, back, family):
    added, restored = (json.loads((place / "llm" / "tokenizer_config.json").read_text()) for place in (original, back))
    assert restored["tokenizer_class"] == added["tokenizer_class"]
    if family == "vila_u":
        assert restored["added_tokens_decoder"] == added["added_tokens_decoder"]
        assert restored["additional_special_tokens"] == added["additional_special_tokens"]
        assert not (back / "llm" / "tokenizer.json").exists()
        generation = json.loads((back / "llm" / "generation_config.json").read_text())
        assert generation["do_sample"] and "suppress_tokens" not in generation and "drawing" not in generation


@pytest.mark.parametrize("layout", ["copied", "saved", "module names"])
def test_every_layout_goes_back(layout, original, folder, family, tmp_path):
    if layout == "copied":
        given = convert(original, tmp_path / "given", copy=True)
    else:
        given = save(folder, tmp_path / "given", save_original_format=layout == "saved")
    if layout == "module names" and family == "vila_u":
        with pytest.raises(ValueError, match="save_original_format"):
            to_original(given, tmp_path / "back")
        return
    back = to_original(given, tmp_path / "back")
    for part in PARTS:
        expected, restored = tensors(original, part), tensors(back, part)
        assert not set(restored) - set(expected)
        for name, tensor in expected.items():
            if name not in restored:
                assert any(unused in name for unused in NOT_SAVED), name
            elif layout != "copied" and any(made_up in name for made_up in MADE_UP):
                assert restored[name].shape == tensor.shape, name
            else:
                assert torch.equal(restored[name], tensor), name
    again = AutoModel.from_pretrained(convert(back, tmp_path / "again"), dtype="auto").state_dict()
    for name, tensor in AutoModel.from_pretrained(folder, dtype="auto").state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_command_goes_back(folder, tmp_path, capsys):
    main(["--to-original", str(folder), str(tmp_path / "back")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "back")
    assert all((tmp_path / "back" / part / "model.safetensors").is_file() for part in PARTS)


# ------------------------------------------------------------------------------------------------------- the releases


@pytest.mark.parametrize("name", SIGLIP_CONFIGS)
def test_released_towers_of_vila_u_keep_their_names(name, tmp_path):
    config = VilaUConfig(vision_config=siglip_config(name, tmp_path))
    config.text_config.dtype = config.vision_config.dtype = "bfloat16"
    processor = SimpleNamespace(image_processor=VilaImageProcessor(), num_video_frames=8)
    files = to_original_u_configs(config, processor, {})
    assert files["vision_tower/config.json"]["rqvaesiglip"]["pretrained_model"] == name
    assert not any("siglip/" in file for file in files)


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("scales", [(1, 2, 4), (1, 2, 4, 10)], ids=["1.5K", "4K"])
def test_released_trunks_keep_their_names(name, scales):
    is_radio = name.startswith("vit_large")
    given = {"model_name": name, "ps3_scales": [(384 if is_radio else 378) * scale for scale in scales]}
    given |= {"select_based_on_layer": [0, 7, 14, 23], "max_select_num": 2560}
    if is_radio:
        given |= {"radio": True, "img_size": 4096, "hidden_size": 1024, "class_token": False, "final_norm": False}
    expected = to_ps3_vision_config(given, {})
    tower = to_original_ps3_tower(Ps3VisionConfig(**expected))
    # SigLIP's and SigLIP 2's trunk have the same shape
    assert tower["model_name"].split("_siglip")[0] == name.split("_siglip")[0] and "trunk_args" not in tower
    assert Ps3VisionConfig(**to_ps3_vision_config(tower, {})).to_dict() == Ps3VisionConfig(**expected).to_dict()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_the_original_cannot_read_is_refused(folder, family, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match="int4"):
        to_original(copy, tmp_path / "back")
    (copy / "config.json").write_text(json.dumps(config))
    if family == "vila_u":
        (copy / "tokenizer.model").unlink()
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
            to_original(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(SystemExit, match="no converted VILA"):
        main(["--to-original", str(SOURCES[family]), str(tmp_path / "back")])
