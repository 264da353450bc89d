"""Attention on CPUs, `attn_implementation="sdpa_cpu"`: torch's fused kernel, and what is faster where that is slow.

- One new token: the query heads that share a key head go through the kernel as rows of one query, at least two.
- A picture in bfloat16, or what is seen closely of one: matrix products of whole heads, which run several times faster
  than the kernel's small ones.
- Everything else, and everything on other devices, is transformers' `sdpa`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import pack_gqa, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
        attention_mask: additive or boolean, broadcastable to `(batch, heads, queries, keys)`.

    Returns:
        `(batch, queries, heads, channels)` and None.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    is_plain = query.device.type == "cpu" and not dropout and not torch.compiler.is_compiling()
    is_plain = is_plain and all(kwargs.get(name) is None for name in ("cache", "position_bias", "softcap"))
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


def is_picture(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether whole-head products are faster: bfloat16 in a processor that multiplies it, but not in tiles (AMX)."""
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return (
        query.dtype == torch.bfloat16
        and not needs_gradient
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
    AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
