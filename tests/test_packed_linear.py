"""Packed weights: the same answers, and what is saved is what was loaded."""

import gc
from pathlib import Path

import pytest
import torch
from conftest import COMMITTED_GOLDENS, GoldenCase
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoProcessor
from vila.packed_linear_vila import PackedLinear, pack_linears

CASE = GoldenCase(COMMITTED_GOLDENS / "vila" / "nvila_lite_image")
pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this processor has no bfloat16 products",
)


@pytest.fixture
def loaded(converted):
    folder = converted(CASE)
    model = AutoModel.from_pretrained(folder, dtype="bfloat16")
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        CASE.chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model, inputs


def test_answers_and_logits_do_not_change(loaded):
    model, inputs = loaded
    options = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**inputs, **options)
    after = pack_linears(model).generate(**inputs, **options)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(before.logits, after.logits, atol=0.02, rtol=0.02)


def test_all_linear_layers_of_the_language_model_are_packed_and_no_others(loaded):
    model, _ = loaded
    tower = [name for name, part in model.model.vision_tower.named_modules() if isinstance(part, nn.Linear)]
    pack_linears(model)
    assert isinstance(model.lm_head, PackedLinear)
    assert not any(isinstance(part, nn.Linear) for part in model.model.language_model.modules())
    assert [n for n, part in model.model.vision_tower.named_modules() if isinstance(part, nn.Linear)] == tower
    pack_linears(model)  # nothing is left to do


def test_what_draws_is_packed_too(vila_u_folder, vila_u_processor):
    model = AutoModel.from_pretrained(vila_u_folder, dtype="bfloat16")
    inputs = vila_u_processor(text="Fireworks.", generation_mode="image", return_tensors="pt")
    options = {"generation_mode": "image", "do_sample": False, "output_logits": True}
    before = model.generate(**inputs, **options)
    after = pack_linears(model).generate(**inputs, **options)
    torch.testing.assert_close(before.logits[:, 0], after.logits[:, 0], atol=0.05, rtol=0.05)
    parts = [part for part in model.model.depth_transformer.modules() if isinstance(part, nn.Linear)]
    assert not parts and isinstance(model.model.depth_transformer.head, PackedLinear)


def test_saving_unpacks(loaded, tmp_path):
    model, _ = loaded
    model.save_pretrained(tmp_path / "before")
    pack_linears(model).save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_weight_file_is_let_go(converted, tmp_path):
    AutoModel.from_pretrained(converted(CASE), dtype="bfloat16").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype="bfloat16")
    maps = Path("/proc/self/maps")
    if not maps.exists() or str(tmp_path) not in maps.read_text():
        pytest.skip("weights are not mapped here")
    pack_linears(model)
    gc.collect()
    assert str(tmp_path) not in maps.read_text()


def test_other_dtypes_are_refused(converted):
    model = AutoModel.from_pretrained(converted(CASE), dtype="float32")
    with pytest.raises(ValueError, match="bfloat16"):
        pack_linears(model)
    assert isinstance(model.lm_head, nn.Linear)
