"""Attention on CPUs, `attn_implementation="sdpa_cpu"`: torch's fused kernel, and what is faster where that is slow.

- One new token: the query heads that share a key head go through the kernel as rows of one query, at least two.
- A picture in bfloat16, or what is seen closely of one: matrix products of whole heads, which run several times faster
  than the kernel's small ones.
- A chunk of a prompt behind others: without a mask and without repeated key heads, both of which grow with the prompt.
- Everything else, and everything on other devices, is transformers' `sdpa`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import pack_gqa, repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

CPU_ATTENTION = "sdpa_cpu"
# shorter rows are faster in the kernel
MIN_PICTURE_TOKENS = 256
# scores that are held at a time: a few megabytes stay in the cache
SCORES_AT_A_TIME = 2**22
# every that manyth key is looked at to guess the largest score of a row
KEY_STRIDE = 16


def cpu_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa_attention_forward`.

    Args:
        query: `(batch, heads, queries, channels)`.
        key, value: `(batch, key heads, keys, channels)`.
        attention_mask: additive or boolean, broadcastable to `(batch, heads, queries, keys)`; or one of no keys, see
            `cpu_mask`.

    Returns:
        `(batch, queries, heads, channels)` and None.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    is_chunk = attention_mask is not None and attention_mask.shape[-1] == 0
    is_plain = query.device.type == "cpu" and not dropout and not torch.compiler.is_compiling()
    is_plain = is_plain and all(kwargs.get(name) is None for name in ("cache", "position_bias", "softcap"))
    if is_chunk and is_plain and not needs_gradient(query, key, value):
        return attend_chunk(query, key, value, scale).transpose(1, 2), None
    if is_chunk:
        queries, keys = query.shape[2], key.shape[2]
        attention_mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=key.device).tril(keys - queries)
    if is_plain and query.shape[2] == 1:
        return attend_one(query, key, value, attention_mask, scale).transpose(1, 2), None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if is_plain and not causal and attention_mask is None and is_picture(query, key):
        return attend_picture(query, key, value, scale).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """One query per head, `(batch, heads, 1, channels)`; arguments as of `cpu_attention_forward`."""
    batch, heads, _, channels = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups, channels)
    if groups == 1:  # the kernel takes twice as long for one row as for two
        rows = rows.expand(-1, -1, 2, -1)
    attended = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=pack_gqa(attention_mask, groups), scale=scale
    )
    return attended[:, :, :groups].reshape(batch, heads, 1, -1)


def attend_chunk(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The last tokens of a longer row, each of which sees all before it; arguments as of `cpu_attention_forward`.

    What lies before the chunk and the chunk itself are attended to apart, and weighed by the sums of their exponents
    (Dao et al., FlashAttention-2, §3.1): neither needs a mask of `queries x keys`. Query heads that share a key head
    are rows of one query, so that no key is repeated.
    """
    batch, heads, queries, channels = query.shape
    groups, past = heads // key.shape[1], key.shape[2] - queries
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows = query.reshape(batch, key.shape[1], groups * queries, channels)
    before, before_sums = kernel(rows, key[:, :, :past], value[:, :, :past], scale=scale)
    own_key, own_value = (repeat_kv(states[:, :, past:], groups) for states in (key, value))
    own, own_sums = kernel(query, own_key, own_value, is_causal=True, scale=scale)
    share = torch.sigmoid(before_sums.reshape(own_sums.shape) - own_sums).unsqueeze(-1)
    return torch.lerp(own.float(), before.reshape(own.shape).float(), share).to(query.dtype)


def cpu_mask(
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """As transformers' `sdpa_mask`, but of no keys, `(1, 1, queries, 0)`, where the last query stands on the last key,
    each sees all before it, and none is padding: None would mean that the first query stands on the first key.
    """
    is_chunk = (
        1 < q_length < kv_length
        and allow_is_causal_skip
        and kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        and kwargs.get("local_size") is None
        and str(kwargs.get("device", "cpu")) == "cpu"
        and not torch.compiler.is_compiling()
        and kv_offset == 0
        and q_offset + q_length == kv_length
    )
    # a mask of fewer tokens than the cache holds would be padded with zeros
    is_whole = attention_mask is None or (attention_mask.shape[-1] >= kv_length and attention_mask.all())
    if is_chunk and is_whole:
        return torch.empty(1, 1, q_length, 0, dtype=torch.bool)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def needs_gradient(*states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(state.requires_grad for state in states)


def is_picture(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether whole-head products are faster: bfloat16 in a processor that multiplies it, but not in tiles (AMX)."""
    return (
        query.dtype == torch.bfloat16
        and not needs_gradient(query, key)
        and query.shape[:2] == key.shape[:2]
        and query.shape[2] >= MIN_PICTURE_TOKENS
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def attend_picture(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Full attention of every head, in bfloat16; arguments as of `cpu_attention_forward`.

    A product of bfloat16 matrices is rounded to bfloat16, which is coarse for large scores. The softmax does not
    change if all scores of a row are moved: they are moved, within the product, so that the largest, which count, come
    near zero. A further channel, a guess at the row's largest score in the query and one in the key, does that.
    """
    batch, heads, length, channels = query.shape
    keys = key.shape[2]
    out = query.new_empty(batch, heads, channels, length)
    step = min(heads, max(1, SCORES_AT_A_TIME // (length * keys)))
    scores = query.new_empty(step, length, keys)
    width = channels + 8 - channels % 8
    moved_query, moved_key = query.new_zeros(heads, length, width), query.new_zeros(heads, width, keys)
    moved_key[:, channels] = 1
    for q, k, v, attended in zip(query, key, value, out):
        moved_query[..., :channels] = q
        moved_query[..., channels] = -torch.bmm(q, k[:, ::KEY_STRIDE].transpose(1, 2)).amax(-1)
        moved_key[:, :channels] = k.transpose(1, 2)
        turned_value = v.transpose(1, 2).contiguous()
        for start in range(0, heads, step):
            some = slice(start, start + step)
            weights = scores[: len(moved_query[some])]
            torch.baddbmm(weights, moved_query[some], moved_key[some], beta=0, alpha=scale, out=weights)
            torch.softmax(weights, -1, out=weights)
            torch.bmm(turned_value[some], weights.transpose(1, 2), out=attended[some])
    return out.transpose(2, 3)


def default_attention() -> str | None:
    """What a model uses if nothing else is asked for: None, transformers' choice, wherever there is an accelerator."""
    return None if torch.accelerator.is_available() else CPU_ATTENTION


def set_default_attention(*configs: Any) -> None:
    """What the parts of a model use, for those of which nothing else was asked."""
    for config in configs:
        config._attn_implementation = config._attn_implementation or default_attention()


def register_cpu_attention() -> None:
    AttentionInterface.register(CPU_ATTENTION, cpu_attention_forward)
    AttentionMaskInterface.register(CPU_ATTENTION, cpu_mask)
