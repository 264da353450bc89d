"""Between features, codes and pixels: the residual quantiser and the pixel decoder of VILA-U.

Shape letters: T positions of a picture, D depth, C channels, h and w rows and columns of the code grid.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.janus.modeling_janus import (
    JanusVQVAEAttnBlock,
    JanusVQVAEConvUpsample,
    JanusVQVAEResnetBlock,
)

from .configuration_vila_u import NORM_GROUPS, VilaUConfig

NORM_EPS = 1e-6


class VilaUCodebook(nn.Embedding):
    """Codes and what they stand for. The last row, of zeros, is on disk but stands for no code."""

    def __init__(self, size: int, channels: int):
        super().__init__(size + 1, channels)

    def forward(self, codes: torch.Tensor | None = None, features: torch.Tensor | None = None) -> torch.Tensor:
        """What codes stand for, or the codes that are nearest to features.

        Distances are computed in float32: in bfloat16 one code in ten would be another one.

        Args:
            codes: `(...)`, for embeddings, `(..., channels)`.
            features: `(..., channels)`, for codes, `(...)`.
        """
        if features is None:
            return super().forward(codes)  # type: ignore[arg-type]
        flat, table = features.float().flatten(0, -2), self.weight[:-1].float()
        norms = flat.square().sum(1, keepdim=True) + table.square().sum(1)
        return torch.addmm(norms, flat, table.T, alpha=-2).argmin(1).view(features.shape[:-1])


class VilaUResidualQuantizer(nn.Module):
    """Features -> codes of several depths, each of what the depths before it left over (VILA-U §3.1; RQ-VAE).

    Codebooks are not trained here: gradients pass straight through to the features.
    """

    def __init__(self, config: VilaUConfig):
        super().__init__()
        self.depth = config.code_depth
        num_books = 1 if config.shared_codebook else self.depth
        self.codebooks = nn.ModuleList(
            VilaUCodebook(config.codebook_size, config.vision_config.hidden_size) for _ in range(num_books)
        )

    def forward(self, features_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., channels)` -> the quantised features, of the same shape, and their codes, `(..., depth)`."""
        with torch.no_grad():
            residual, codes = features_TC.float(), []
            for depth in range(self.depth):
                codes.append(self._codebook(depth)(features=residual))
                residual = residual - self.embed_depth(codes[-1], depth).float()
            all_codes = torch.stack(codes, dim=-1)
            quantised = self.embed(all_codes).sum(-2)
        # the gradient of the features, with the value of the codes
        return features_TC + (quantised - features_TC).detach(), all_codes

    def embed(self, codes_TD: torch.Tensor) -> torch.Tensor:
        """Embeddings of the codes of all depths, `(..., depth) -> (..., depth, channels)`; quantised: their sum."""
        return torch.stack([self.embed_depth(codes, depth) for depth, codes in enumerate(codes_TD.unbind(-1))], dim=-2)

    def embed_depth(self, codes: torch.Tensor, depth: int) -> torch.Tensor:
        """Embeddings of codes of one depth, `(...) -> (..., channels)`."""
        return self._codebook(depth)(codes).detach()

    def _codebook(self, depth: int) -> nn.Module:
        return self.codebooks[min(depth, len(self.codebooks) - 1)]


class VilaUPixelDecoder(nn.Module):
    """Quantised features -> pixels: the decoder of VQGAN (Taming Transformers §3.1), in transformers' Janus blocks."""

    def __init__(self, config: VilaUConfig):
        super().__init__()
        self.latent_shape = config.decoder_latent_shape
        widths = [config.decoder_channels * factor for factor in config.decoder_channel_multipliers]
        options = SimpleNamespace(dropout=0.0)
        self.post_quant_conv = nn.Conv2d(config.vision_config.hidden_size, config.decoder_latent_channels, 1)
        self.conv_in = nn.Conv2d(config.decoder_latent_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleDict(
            {
                "block_1": JanusVQVAEResnetBlock(options, widths[-1], widths[-1]),
                "attn_1": JanusVQVAEAttnBlock(widths[-1]),
                "block_2": JanusVQVAEResnetBlock(options, widths[-1], widths[-1]),
            }
        )
        levels, channels = [], widths[-1]
        for level in reversed(range(len(widths))):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            # counted from what the decoder was made for, not from what it is given
            has_attention = config.decoder_resolution // 2**level in config.decoder_attention_resolutions
            for _ in range(config.decoder_num_res_blocks + 1):
                blocks.append(JanusVQVAEResnetBlock(options, channels, widths[level]))
                channels = widths[level]
                if has_attention:
                    attentions.append(JanusVQVAEAttnBlock(channels))
            parts = {"block": blocks, "attn": attentions}
            levels.append(nn.ModuleDict(parts | ({"upsample": JanusVQVAEConvUpsample(channels)} if level else {})))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, features_hwC: torch.Tensor) -> torch.Tensor:
        """`(N, h, w, channels) -> (N, 3, height, width)`, about -1 to 1."""
        maps = features_hwC.permute(0, 3, 1, 2)
        if self.latent_shape is not None:
            size = tuple(self.latent_shape)
            maps = F.interpolate(maps.float(), size=size, mode="bilinear").to(maps.dtype)
        maps = self.conv_in(self.post_quant_conv(maps))
        for part in self.mid.values():
            maps = part(maps)
        levels: list[Any] = list(self.up)
        for level in reversed(levels):
            for number, block in enumerate(level["block"]):
                maps = block(maps)
                if len(level["attn"]):
                    maps = level["attn"][number](maps)
            if "upsample" in level:
                maps = level["upsample"](maps)
        return self.conv_out(F.silu(self.norm_out(maps)))


__all__ = ["VilaUPixelDecoder", "VilaUResidualQuantizer"]
