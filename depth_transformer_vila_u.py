"""The depth transformer: a language model's hidden state -> the codes of one position, one after the other.

VILA-U §3.2, after RQ-Transformer. Every position is a short sequence of its own: the hidden state, then the sum of the
embeddings of the codes so far. Shape letters: N positions, D depth, E width, C channels of a code, K codes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from .configuration_vila_u import VilaUConfig

MLP_FACTOR = 4
NORM_EPS = 1e-5


class VilaUDepthAttention(nn.Module):
    def __init__(self, config: VilaUConfig, layer: int):
        super().__init__()
        width = config.depth_hidden_size
        self.layer, self.num_heads = layer, config.depth_num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_NDE: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        query, key, value = (
            projection(hidden_NDE).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        # with a cache there is one query, which sees everything before it
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class VilaUDepthLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: VilaUConfig, layer: int):
        super().__init__()
        width = config.depth_hidden_size
        self.pre_attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = VilaUDepthAttention(config, layer)
        self.pre_mlp_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_FACTOR * width), nn.GELU(), nn.Linear(MLP_FACTOR * width, width))
        self.dropout = nn.Dropout(config.depth_dropout)

    def forward(self, hidden_NDE: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        hidden_NDE = hidden_NDE + self.dropout(self.attention(self.pre_attention_norm(hidden_NDE), cache))
        return hidden_NDE + self.dropout(self.mlp(self.pre_mlp_norm(hidden_NDE)))


class VilaUDepthTransformer(nn.Module):
    """Predicts codes along the depth; it holds no codebook, the caller embeds codes."""

    def __init__(self, config: VilaUConfig):
        super().__init__()
        width = config.depth_hidden_size
        self.code_projection = nn.Linear(config.vision_config.hidden_size, width)
        self.hidden_projection = nn.Linear(config.text_config.hidden_size, width)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.code_depth, width))
        self.layers = nn.ModuleList(VilaUDepthLayer(config, layer) for layer in range(config.depth_num_layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, config.codebook_size)

    def forward(
        self,
        inputs: torch.Tensor,
        embeddings_NDC: torch.Tensor | None = None,
        depth: int = 0,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits of codes: of all depths at once, given the true codes (teacher forcing), or of one with a cache.

        Args:
            inputs: hidden states that predict the positions, `(N, hidden_size)`; with a cache and `depth` above 0 the
                summed embeddings of the codes so far, `(N, channels)`.
            embeddings_NDC: without a cache, embeddings of the true codes, `(N, depth, channels)`; those of the last
                depth are not looked at.
            depth: with a cache, which one, in order from 0.
            cache: new at depth 0, then the same: it holds what lies before.

        Returns:
            `(N, depth, codebook_size)`; with a cache `(N, codebook_size)`.
        """
        if cache is not None:
            projection: Any = self.code_projection if depth else self.hidden_projection
            step = projection(inputs).unsqueeze(1) + self.position_embedding[:, depth : depth + 1]
            return self._run(step, cache).squeeze(1)
        steps = [self.hidden_projection(inputs).unsqueeze(1)]
        if embeddings_NDC is not None:
            steps.append(self.code_projection(embeddings_NDC[:, :-1].cumsum(1)))
        hidden_NDE = torch.cat(steps, dim=1)
        return self._run(hidden_NDE + self.position_embedding[:, : hidden_NDE.shape[1]], None)

    def _run(self, hidden_NDE: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        for layer in self.layers:
            hidden_NDE = layer(hidden_NDE, cache)
        return self.head(self.norm(hidden_NDE))


__all__ = ["VilaUDepthTransformer"]
