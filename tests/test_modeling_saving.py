"""The model alone: what loading, saving, resizing and placing it keeps."""

import hashlib
import logging

import pytest
import torch
from chat_requests import encode, user
from tiny_models import CHECKPOINTS, close, load, picture, pixels, prompt, tiny_model
from torch import nn
from transformers import AutoProcessor
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from vila.modeling_vila import VilaForConditionalGeneration, VilaModel


def checksum(model):
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def without_name(config):
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def loaded_cleanly(model_class, folder):
    model, info = model_class.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_saving_and_loading_keeps_every_weight(converted, checkpoint, original_format, tmp_path):
    model = loaded_cleanly(VilaForConditionalGeneration, converted(checkpoint))
    model.save_pretrained(tmp_path, save_original_format=original_format)
    again = loaded_cleanly(VilaForConditionalGeneration, tmp_path)
    assert checksum(again) == checksum(model)
    assert without_name(again.config) == without_name(model.config)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_loading_is_deterministic_and_silent(converted, checkpoint, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        first, second = (checksum(load(converted(checkpoint))) for _ in range(2))
    finally:
        logger.removeHandler(caplog.handler)
    assert first == second
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("original_format", [None, True, False])
@torch.no_grad()
def test_model_without_head_loads_from_the_same_folder(converted, original_format, tmp_path):
    folder = converted("nvila_lite_image")
    whole = load(folder)
    if original_format is not None:
        whole.save_pretrained(tmp_path, save_original_format=original_format)
        folder = tmp_path
    headless, info = VilaModel.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert checksum(headless) == checksum(whole.model)


@torch.no_grad()
def test_tied_head_shares_the_embeddings_and_survives_saving(tmp_path):
    model = tiny_model(text={"tie_word_embeddings": True})
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = loaded_cleanly(VilaForConditionalGeneration, tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert checksum(again) == checksum(model)


def test_head_is_its_own_weight_where_it_is_not_tied():
    model = tiny_model()
    assert model.lm_head.weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("rows", [60, 72, 80])
@torch.no_grad()
def test_resized_embeddings_keep_the_answers(rows, tmp_path):
    model = tiny_model()
    inputs = {"input_ids": prompt(model.config, 4), "pixel_values": pixels(1)}
    before = model(**inputs).logits
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == rows
    after = model(**inputs, labels=inputs["input_ids"])
    assert after.logits.shape[-1] == rows and after.loss.isfinite()
    shared = min(rows, 64)
    close(after.logits[..., :shared], before[..., :shared])
    model.save_pretrained(tmp_path)
    assert checksum(loaded_cleanly(VilaForConditionalGeneration, tmp_path)) == checksum(model)


@pytest.mark.parametrize("checkpoint", ["nvila_lite_image", "nvila_dynamic_s2_image", "vila15_s2_image"])
@pytest.mark.parametrize("max_memory", [None, {"cpu": "200KB"}], ids=["cpu", "disk"])
@torch.no_grad()
def test_placement_by_accelerate_does_not_change_the_answer(converted, checkpoint, max_memory, tmp_path):
    folder = converted(checkpoint)
    inputs = encode(AutoProcessor.from_pretrained(folder), [user(picture("red", (90, 40)), "What is this?")])
    expected = load(folder)
    placed = load(folder, device_map="auto", max_memory=max_memory, offload_folder=tmp_path)
    assert set(getattr(placed, "hf_device_map", {"": "cpu"}).values()) == ({"cpu", "disk"} if max_memory else {"cpu"})
    close(placed(**inputs).logits, expected(**inputs).logits)
    options = {**inputs, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(placed.generate(**options), expected.generate(**options))


def test_parts_are_found_where_engines_look_for_them():
    model = tiny_model()
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.get_decoder() is model.model.language_model
    assert model.base_model is model.model


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_base_model_alone_loads_without_a_rest(converted, checkpoint):
    _, info = VilaModel.from_pretrained(converted(checkpoint), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_layers_behind_the_selected_one_are_never_built(monkeypatch):
    built, build = [], SiglipEncoderLayer.__init__

    def spy(layer, config):
        built.append(layer)
        build(layer, config)

    monkeypatch.setattr(SiglipEncoderLayer, "__init__", spy)
    model = tiny_model()
    assert len(built) == model.config.num_vision_layers == model.config.vision_config.num_hidden_layers - 1
