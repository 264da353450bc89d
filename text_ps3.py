"""The text tower of PS3: a text -> its embedding, and the prompt that says what to look for (top-down)."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_ps3 import Ps3TextConfig
from .vision_ps3 import Ps3Mlp


class Ps3TextMlp(nn.Module):
    def __init__(self, config: Ps3TextConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU(approximate=config.hidden_act_approximate)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(states)))


class Ps3TextBlock(nn.Module):
    def __init__(self, config: Ps3TextConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Ps3TextMlp(config)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(states)
        states = states + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return states + self.mlp(self.ln_2(states))


class Ps3TextTransformer(nn.Module):
    def __init__(self, config: Ps3TextConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(Ps3TextBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for block in self.resblocks:
            states = block(states, mask)
        return states


class Ps3TextTower(nn.Module):
    """`(B, context_length)` ids -> `(B, projection_size)` embeddings and `(B, prompt_size)` prompts."""

    def __init__(self, config: Ps3TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(config.context_length, config.hidden_size))
        self.transformer = Ps3TextTransformer(config)
        self.ln_final = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.projection_bias:
            self.text_projection: nn.Module | nn.Parameter = nn.Linear(config.hidden_size, config.projection_size)
        else:
            self.text_projection = nn.Parameter(torch.zeros(config.hidden_size, config.projection_size))
        size = config.projection_size
        self.prompt_proj = Ps3Mlp(size, size, config.prompt_size, norm_eps=1e-5)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, length = self.config, input_ids.shape[1]
        if length > config.context_length:
            raise ValueError(f"a text has {length} ids, more than the {config.context_length} of the text tower")
        states = self.token_embedding(input_ids) + self.positional_embedding[:length]
        mask = None
        if config.is_causal:
            mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        states = self.ln_final(self.transformer(states, mask))
        if config.pool_type == "argmax":
            pooled = states[torch.arange(len(states), device=states.device), input_ids.argmax(1)]
        else:
            pooled = states[:, -1 if config.pool_type == "last" else 0]
        project = self.text_projection
        embeds = project(pooled) if isinstance(project, nn.Linear) else pooled @ project
        return embeds, self.prompt_proj(F.normalize(embeds, dim=-1))
