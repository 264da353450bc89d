"""int4 of the other families: the language model of a VILA-U or VILA-HD, searched by the same command."""

import json

import pytest
import torch
from conftest import COMMITTED_GOLDENS
from PIL import Image
from transformers import AutoModel, AutoProcessor
from vila.conversion_vila import convert
from vila.int4_linear_vila import Int4Linear
from vila.quantize.checkpoint import REPORT
from vila.quantize.command import main

CASES = {"vila_u": "vila_u/image_generation", "vila_hd": "vila_hd/vila_hd_vlm"}
QUESTION = "what is the color of the big sign?"


@pytest.fixture(scope="module", params=CASES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def source(family, tmp_path_factory):
    return convert(COMMITTED_GOLDENS / CASES[family] / "checkpoint", tmp_path_factory.mktemp("families") / family)


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("families") / "awq"
    main([str(source), str(target), "--group-size", "32", "--samples", "4", "--max-tokens", "64"])
    return target


@pytest.fixture(scope="module")
def model(quantized):
    return AutoModel.from_pretrained(quantized, dtype="auto").eval()


def answer(model, folder):
    picture = Image.linear_gradient("L").convert("RGB").resize((280, 280))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}]
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, -6:].tolist()


def test_the_language_model_is_int4_and_nothing_else(model, family):
    small = [name for name, part in model.named_modules() if isinstance(part, Int4Linear)]
    assert small and all(name.startswith("model.language_model.layers.") for name in small)
    assert len(small) == 7 * model.config.text_config.num_hidden_layers
    assert model.config.model_type == family and model.dtype == torch.bfloat16


def test_what_is_left_alone_is_that_of_the_source(model, source):
    whole = AutoModel.from_pretrained(source, dtype="bfloat16")
    kept = {name: weight for name, weight in whole.state_dict().items() if ".language_model.layers." not in name}
    stored = model.state_dict()
    assert len(kept) > 50
    for name, weight in kept.items():
        assert torch.equal(stored[name], weight), name


def test_the_search_of_every_layer_is_reported(quantized):
    report = json.loads((quantized / REPORT).read_text())
    assert report["method"] == "awq" and len(report["losses"]) == 2


def test_it_answers_and_saving_changes_nothing(model, quantized, tmp_path):
    expected = answer(model, quantized)
    model.save_pretrained(tmp_path)
    assert answer(AutoModel.from_pretrained(tmp_path, dtype="auto").eval(), quantized) == expected


def test_it_draws(model, quantized, family):
    if family != "vila_u":
        pytest.skip("only a VILA-U draws")
    inputs = AutoProcessor.from_pretrained(quantized)(text="Fireworks.", generation_mode="image", return_tensors="pt")
    drawn = model.generate(**inputs, generation_mode="image", do_sample=False)
    assert drawn.sequences.shape == (1, 64, 4) and drawn.pixel_values.isfinite().all()


def test_options_of_every_vila_reach_the_config(quantized, family):
    """Those that a family's config inherits, too."""
    own = {"vila_u": {"depth_dropout": 0.5}, "vila_hd": {"num_look_close": 3}}[family]
    loaded = AutoModel.from_pretrained(quantized, dtype="float32", vision_chunk_size=3, **own)
    assert loaded.config.vision_chunk_size == 3 and loaded.dtype == torch.float32
    assert all(getattr(loaded.config, name) == value for name, value in own.items())
    called = type(loaded).from_pretrained(quantized, vision_chunk_size=3, dtype="bfloat16", **own)
    assert called.config.vision_chunk_size == 3 and called.dtype == torch.bfloat16
    assert all(getattr(called.config, name) == value for name, value in own.items())
