"""The ViT trunk of PS3: patches of one picture at several scales go through the same blocks.

Shape letters: B pictures, L tokens, D channels, K chosen patches, P pixels per side of a patch, h, w a grid.

- A block can see cached keys and values of other tokens, which is how chosen patches see the low-resolution view.
- Only patches that were chosen are cut out of a picture, and a picture is resized to a scale once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward

from .configuration_ps3 import Ps3VisionConfig

KeysValues = tuple[torch.Tensor, torch.Tensor]


class Ps3Attention(nn.Module):
    def __init__(self, config: Ps3VisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens_BLD: torch.Tensor, seen: KeysValues | None) -> tuple[torch.Tensor, KeysValues]:
        qkv = self.qkv(tokens_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = own_query, own_key, own_value = qkv.unbind(0)
        if seen is not None:
            key, value = torch.cat([seen[0], own_key], 2), torch.cat([seen[1], own_value], 2)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attend(self, own_query, key, value, None, scaling=query.shape[-1] ** -0.5, is_causal=False)
        return self.proj(attended.flatten(2)), (own_key, own_value)


class Ps3Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))`, with a norm between the last two in the projections of PS3."""

    def __init__(self, size: int, hidden: int, out: int | None = None, norm_eps: float | None = None):
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.norm: nn.Module = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, size if out is None else out)

    def forward(self, features: torch.Tensor, outputs: int | None = None) -> torch.Tensor:
        """Args: outputs: compute only the first that many channels."""
        hidden = self.norm(F.gelu(self.fc1(features)))
        return self.fc2(hidden) if outputs is None else first_outputs(self.fc2, hidden, outputs)


def first_outputs(layer: nn.Module, features: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` outputs of a linear layer; of a packed, quantised or offloaded one all are computed."""
    if type(layer) is nn.Linear and not hasattr(layer, "_hf_hook"):
        return F.linear(features, layer.weight[:count], layer.bias[:count])
    return layer(features)[..., :count]


class Ps3Block(GradientCheckpointingLayer):
    def __init__(self, config: Ps3VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Ps3Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Ps3Mlp(config.hidden_size, config.intermediate_size)

    def forward(self, tokens_BLD: torch.Tensor, seen: KeysValues | None = None) -> tuple[torch.Tensor, KeysValues]:
        """Tokens after the block, and their own keys and values, each `(B, heads, L, channels)`.

        Args:
            seen: keys and values of tokens that are seen besides, in front of the own ones.
        """
        attended, own = self.attn(self.norm1(tokens_BLD), seen)
        tokens_BLD = tokens_BLD + attended
        return tokens_BLD + self.mlp(self.norm2(tokens_BLD)), own


class Ps3PatchEmbed(nn.Module):
    def __init__(self, config: Ps3VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """All patches of a picture: `(B, 3, h * P, w * P) -> (B, h * w, D)`."""
        return self.proj(pixels).flatten(2).transpose(1, 2)

    def embed_chosen(self, pixels: torch.Tensor, indices_BK: torch.Tensor) -> torch.Tensor:
        """Only the patches of these row-major indices, `(B, K, D)`."""
        side, width = self.proj.kernel_size[0], pixels.shape[3] // self.proj.kernel_size[0]
        patches = pixels.unflatten(3, (width, side)).unflatten(2, (-1, side))
        rows = torch.arange(len(pixels), device=pixels.device).unsqueeze(1)
        chosen = patches[rows, :, indices_BK // width, :, indices_BK % width]
        return F.linear(chosen.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


class Ps3AttentionPool(nn.Module):
    """One learned query attends over all tokens (the "map" head of SigLIP)."""

    def __init__(self, config: Ps3VisionConfig):
        super().__init__()
        size = config.pooling_size
        self.num_heads = config.num_attention_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, size))
        self.q = nn.Linear(size, size)
        self.kv = nn.Linear(size, 2 * size)
        self.proj = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = Ps3Mlp(size, config.intermediate_size if size == config.hidden_size else int(size * 3.7362))

    def forward(self, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, D)`; pooled are the tokens whose mask is True, or all of a row that has none."""
        query = self.q(self.latent.expand(len(tokens_BLD), -1, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys, values = self.kv(tokens_BLD).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if mask_BL is not None:
            mask_BL = (mask_BL | ~mask_BL.any(1, keepdim=True))[:, None, None]
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask_BL)
        pooled = self.proj(attended.transpose(1, 2).flatten(2))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class Ps3Adapter(nn.Module):
    """From C-RADIO's width to that of SigLIP's pooling: residual blocks of norm, GELU and a linear layer."""

    def __init__(self, config: Ps3VisionConfig):
        super().__init__()
        size = config.adapter_size
        self.fc1 = nn.Linear(config.hidden_size, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.GELU(), nn.Linear(size, size)) for _ in range(config.adapter_blocks)
        )
        self.final = nn.Sequential(nn.LayerNorm(size), nn.GELU(), nn.Linear(size, config.pooling_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.fc1(tokens)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.final(tokens)


class Ps3Trunk(nn.Module):
    """Args: has_pooling: whether norm, adapter and pooling are built, which token features do not go through."""

    def __init__(self, config: Ps3VisionConfig, has_pooling: bool):
        super().__init__()
        self.config = config
        self.patch_embed = Ps3PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.position_grid**2, config.hidden_size))
        self.blocks = nn.ModuleList(Ps3Block(config) for _ in range(config.num_hidden_layers))
        self.has_pooling = has_pooling and config.pooling_size > 0
        if self.has_pooling:
            self.norm: nn.Module = nn.Identity()
            if config.final_norm:
                self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.siglip_proj: nn.Module = Ps3Adapter(config) if config.adapter_size else nn.Identity()
            self.attn_pool = Ps3AttentionPool(config)

    def positions(self, height: int, width: int, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Positions of a grid of patches, `(h * w, D)`.

        Args:
            indices: row-major, `(...)`: only those of these patches, `(..., D)`.
        """
        side, device = self.config.position_grid, self.pos_embed.device
        if indices is None:
            indices = torch.arange(height * width, device=device)
        rows, columns = indices // width, indices % width
        if height == width == side or self.config.position_mode == "crop":
            return self.pos_embed[0, rows * side + columns]
        # of thousands of places a few are looked at: weights of the table's rows and columns, not a table of all
        weights = resize_weights(side, max(height, width), device)
        mixed = weights[rows].unsqueeze(-1) * weights[columns].unsqueeze(-2)
        return (mixed.flatten(-2) @ self.pos_embed[0].float()).to(self.pos_embed.dtype)

    def pool(self, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Output of the last block -> `(B, pooling_size)`.

        Raises:
            ValueError: if the checkpoint has no pooling.
        """
        if not self.has_pooling:
            raise ValueError("this checkpoint holds no pooling: it gives token features only")
        return self.attn_pool(self.siglip_proj(self.norm(tokens_BLD)), mask_BL)


def resize_weights(size: int, new_size: int, device: torch.device) -> torch.Tensor:
    """`(new_size, size)`: how much of every old row a new one takes; bicubic, in float32."""
    each = torch.eye(size, device=device)[None, None]
    # the filter of antialias differs from plain bicubic where it enlarges, too
    return F.interpolate(each, size=(new_size, size), mode="bicubic", antialias=True)[0, 0]


class Ps3Pyramid:
    """Pictures at every scale, each resized from the original when it is first looked at, and then kept.

    Args:
        pixels: `(B, 3, height, width)`.
        scales: pixels per side; those of the longer side where a picture is no square. The first is a square always.
        patch_size: pixels per side.
    """

    def __init__(self, pixels: torch.Tensor, scales: list[int], patch_size: int):
        self.pixels = pixels
        height, width = pixels.shape[2:]
        self.grids: list[tuple[int, int]] = []
        for scale in scales[1:]:
            zoom = scale // scales[0]
            short = int(scales[0] / max(height, width) * min(height, width))
            shorter = max(short // patch_size, 1) * zoom
            longer = scales[0] * zoom // patch_size
            self.grids.append(
                (longer, longer) if height == width else (longer, shorter) if height > width else (shorter, longer)
            )
        self.patch_size = patch_size
        self._resized: dict[tuple[int, int], torch.Tensor] = {}

    def resized(self, height: int, width: int) -> torch.Tensor:
        """The pictures at a size, in float32 on the way; without antialias, as released weights were trained."""
        if (height, width) == self.pixels.shape[2:]:
            return self.pixels
        if (height, width) not in self._resized:
            resized = F.interpolate(self.pixels.float(), size=(height, width), mode="bicubic", align_corners=False)
            self._resized[height, width] = resized.to(self.pixels.dtype)
        return self._resized[height, width]

    def at_scale(self, number: int) -> torch.Tensor:
        """The pictures at a high-resolution scale."""
        rows, columns = self.grids[number]
        return self.resized(rows * self.patch_size, columns * self.patch_size)
