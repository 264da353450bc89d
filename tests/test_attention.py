"""`sdpa_cpu`: the same attention as torch's, by other means."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMITTED_GOLDENS
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from vila import attention_vila
from vila.attention_vila import CPU_ATTENTION, MIN_PICTURE_TOKENS, attend_picture, cpu_attention_forward, is_picture

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_bfloat16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    reason="this processor leaves pictures to torch's kernel",
)


def states(batch, heads, key_heads, queries, keys, channels, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, queries), (key_heads, keys), (key_heads, keys)]
    # as the projections give them: tokens before heads
    return [
        (torch.randn(batch, length, count, channels, generator=generator) * scale).to(dtype).transpose(1, 2)
        for count, length in shapes
    ]


def module(heads, key_heads, is_causal):
    return SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=is_causal)


def masks(batch, heads, keys, dtype):
    seen = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    seen[0, ..., : keys // 2] = False
    additive = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return [None, seen, additive, additive.expand(-1, heads, -1, -1).contiguous()]


@pytest.mark.parametrize("mask", range(4), ids=["none", "boolean", "additive", "per head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2), (6, 1)])
def test_one_new_token_attends_as_in_transformers(heads, key_heads, dtype, mask):
    query, key, value = states(2, heads, key_heads, 1, 37, 16, dtype)
    chosen = masks(2, heads, 37, dtype)[mask]
    layer = module(heads, key_heads, True)
    expected, _ = sdpa_attention_forward(layer, query, key, value, chosen, scaling=0.3)
    attended, weights = cpu_attention_forward(layer, query, key, value, chosen, scaling=0.3)
    assert weights is None and attended.shape == expected.shape == (2, 1, heads, 16)
    torch.testing.assert_close(attended, expected)


def test_one_new_token_has_gradients():
    query, key, value = (state.requires_grad_() for state in states(1, 4, 2, 1, 9, 8))
    attended, _ = cpu_attention_forward(module(4, 2, True), query, key, value, None)
    attended.sum().backward()
    assert key.grad is None or torch.isfinite(key.grad).all()
    assert (
        torch.autograd.grad(cpu_attention_forward(module(4, 2, True), query, key, value, None)[0].sum(), value)[0]
        .abs()
        .sum()
        > 0
    )


@needs_bfloat16
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize(
    ("length", "keys", "channels"),
    [(MIN_PICTURE_TOKENS, MIN_PICTURE_TOKENS, 72), (577, 577, 64), (1025, 1025, 128), (301, 730, 72)],
)
def test_pictures_are_as_exact_as_in_the_kernel(length, keys, channels, scale):
    """Scores have a standard deviation of up to 4, where rounding them as they are would cost three times as much."""
    query, key, value = states(1, 3, 3, length, keys, channels, scale=scale)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    halves = [state.to(torch.bfloat16) for state in (query, key, value)]
    ours = attend_picture(*halves, channels**-0.5)
    kernel = F.scaled_dot_product_attention(*halves)
    errors = [((attended.double() - exact).norm() / exact.norm()).item() for attended in (ours, kernel)]
    assert errors[0] < 1.5 * errors[1] < 0.02


@needs_bfloat16
def test_far_scores_and_one_that_outshines_all_stay_finite():
    query, key, value = states(1, 2, 2, 300, 300, 64, torch.bfloat16)
    query, key = query * 30, key * 30
    key[:, :, 7] *= 20  # none of the keys that the guess looks at
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    attended = attend_picture(query, key, value, 64**-0.5)
    assert torch.isfinite(attended).all()
    assert (attended.double() - expected).abs().mean() < 0.05


@needs_bfloat16
@pytest.mark.parametrize(("batch", "heads", "at_a_time"), [(1, 5, 1), (3, 4, 3), (2, 2, 64)])
def test_every_head_of_every_picture_is_attended(batch, heads, at_a_time, monkeypatch):
    monkeypatch.setattr(attention_vila, "SCORES_AT_A_TIME", at_a_time * MIN_PICTURE_TOKENS**2)
    query, key, value = states(batch, heads, heads, MIN_PICTURE_TOKENS, MIN_PICTURE_TOKENS, 20, torch.bfloat16)
    layer = module(heads, heads, False)
    expected, _ = sdpa_attention_forward(layer, query, key, value, None)
    attended, _ = cpu_attention_forward(layer, query, key, value, None)
    torch.testing.assert_close(attended, expected, atol=0.02, rtol=0.05)


@needs_bfloat16
def test_what_is_no_picture_is_left_to_the_kernel():
    query, key, _ = states(1, 2, 2, MIN_PICTURE_TOKENS, MIN_PICTURE_TOKENS, 8, torch.bfloat16)
    assert not is_picture(query.float(), key.float())
    assert not is_picture(query[:, :, :-1], key[:, :, :-1])
    assert is_picture(query, key[:, :, :-1]) and not is_picture(query, key[:, :1])
    assert not is_picture(query.clone().requires_grad_(), key)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [2, 300])
def test_other_calls_are_those_of_transformers(queries, is_causal):
    query, key, value = states(2, 4, 2, queries, 300, 16)
    mask = None if queries == 300 else torch.rand(2, 1, queries, 300) > 0.5
    layer = module(4, 2, is_causal)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask)
    attended, _ = cpu_attention_forward(layer, query, key, value, mask)
    assert torch.equal(attended, expected)


LITE = COMMITTED_GOLDENS / "vila" / "nvila_lite_image"


@pytest.mark.parametrize("has_accelerator", [False, True])
def test_cpu_attention_is_the_default_where_there_is_no_accelerator(has_accelerator, converted, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    model = AutoModel.from_pretrained(converted("nvila_lite_image"), dtype="auto")
    expected = "sdpa" if has_accelerator else CPU_ATTENTION
    parts = (model, model.model, model.model.vision_tower, model.model.language_model)
    assert [part.config._attn_implementation for part in parts] == [expected] * 4


@pytest.mark.parametrize("chosen", ["sdpa", "eager", {"vision_config": "eager"}])
def test_what_is_asked_for_stays(chosen, converted):
    model = AutoModel.from_pretrained(converted("nvila_lite_image"), dtype="auto", attn_implementation=chosen)
    by_part = chosen if isinstance(chosen, dict) else dict.fromkeys(("vision_config", "text_config"), chosen)
    for part in ("vision_config", "text_config"):
        assert getattr(model.config, part)._attn_implementation == by_part.get(part, CPU_ATTENTION)
    if isinstance(chosen, str):
        assert model.config._attn_implementation == chosen
    model.set_attn_implementation("sdpa")
    assert model.model.language_model.config._attn_implementation == "sdpa"
