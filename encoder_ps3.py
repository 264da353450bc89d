"""PS3's encoder: it sees a whole picture at low resolution, and of up to 4K only chosen patches.

- Three steps, each done once: the low-resolution view, the scores of its places, and the looks at the best patches.
- A look is a pass of chosen patches that sees the low-resolution view through its cached keys and values.
- Token features are raw outputs of the blocks; the trunk's last norm belongs to the pooled output.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from .attention_vila import default_attention, register_cpu_attention
from .configuration_ps3 import Ps3VisionConfig
from .selection_ps3 import (
    CONV_INPUT_SIZE,
    Ps3ConvBlock,
    Ps3ConvNet,
    at_grids,
    check_looks,
    choose_patches,
    place_logits,
    plan_looks,
    to_probabilities,
)
from .vision_ps3 import KeysValues, Ps3AttentionPool, Ps3Mlp, Ps3Pyramid, Ps3Trunk, first_outputs
from .weight_loading_vila import VilaCompleteLoading

register_cpu_attention()


@dataclass
class Ps3Output(ModelOutput):
    r"""
    last_hidden_state: `(B, low-resolution tokens + chosen patches, hidden_size)`, output of the last block. Chosen
        patches are sorted by scale, then row by row.
    hidden_states: the same of every block.
    selection_maps: for each high-resolution scale `(B, h, w)`, 1 where a patch was chosen; None without a look.
    selection_probs: for each high-resolution scale `(B, h, w)`, what the choice was made by.
    look_indices: for each look and scale the row-major indices of its patches, `(B, count)`.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    selection_maps: list[torch.Tensor] | None = None
    selection_probs: list[torch.Tensor] | None = None
    look_indices: list[list[torch.Tensor]] | None = None


@dataclass
class LowResView:
    """Pictures seen at low resolution: what every further step starts from.

    hidden_states: output of every block, `(B, N, D)`; keys_values: of every block; conv_features: see `Ps3ConvNet`.
    """

    pyramid: Ps3Pyramid
    hidden_states: list[torch.Tensor]
    keys_values: list[KeysValues]
    conv_features: torch.Tensor | None = None
    place_features: torch.Tensor | None = None


class Ps3PreTrainedModel(VilaCompleteLoading):
    config: Any
    input_modalities = ("image", "text")  # type: ignore[assignment]
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        return super().get_correct_attn_implementation(requested_attention or default_attention(), *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_ps3_weights(module, getattr(self.config, "initializer_range", 0.02))


def init_ps3_weights(module: nn.Module, std: float) -> None:
    """Parameters that belong to no layer of torch."""
    if isinstance(module, Ps3Trunk):
        init.normal_(module.pos_embed, std=std)
    elif isinstance(module, Ps3AttentionPool):
        init.normal_(module.latent, std=std)
    elif isinstance(module, Ps3ConvBlock):
        init.ones_(module.weight)
    elif isinstance(module, Ps3VisionModel):
        init.normal_(module.prior_prompt, std=std)
        for table in module.pos_emb_residual:
            init.zeros_(table)


class Ps3VisionModel(Ps3PreTrainedModel):
    """The encoder.

    Args:
        has_pooling: False leaves the pooling out, which token features do not need.
    """

    config: Ps3VisionConfig
    config_class = Ps3VisionConfig

    def __init__(self, config: Ps3VisionConfig, has_pooling: bool = True):
        super().__init__(config)
        width, num_highres = config.hidden_size, len(config.ps3_scales) - 1
        self.trunk = Ps3Trunk(config, has_pooling)
        self.prior_prompt = nn.Parameter(torch.zeros(width))
        seen = len(config.select_based_on_layer) * width
        # one group of outputs for every scale, of which released code uses the first
        self.selection_feature_proj = Ps3Mlp(seen, seen, num_highres * width, norm_eps=1e-5)
        grids = [scale // config.patch_size for scale in config.ps3_scales[1:]] if config.separate_pos_emb else []
        self.pos_emb_residual = nn.ParameterList(torch.zeros(1, side**2, width) for side in grids)
        if config.highres_selection_feature:
            self.highres_selection_feature_module = Ps3ConvNet(config)
            out = config.highres_selection_module_out_dim
            self.prompt_proj_for_highres = nn.Linear(width, num_highres * out)
        self.post_init()

    def see_low_res(self, pixel_values: torch.Tensor) -> LowResView:
        """The whole picture at the smallest scale.

        Args:
            pixel_values: `(B, 3, height, width)` at the largest scale; no square is needed.

        Raises:
            ValueError: for another shape.
        """
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.numel():
            raise ValueError(f"pixel_values must be (pictures, 3, height, width), got {tuple(pixel_values.shape)}")
        pixel_values = pixel_values.to(self.trunk.pos_embed.dtype)
        pyramid = Ps3Pyramid(pixel_values, config.ps3_scales, config.patch_size)
        side = config.ps3_scales[0] // config.patch_size
        tokens = self.trunk.patch_embed(pyramid.resized(config.ps3_scales[0], config.ps3_scales[0]))
        tokens = tokens + self.trunk.positions(side, side)
        view = LowResView(pyramid, [], [])
        for block in self.trunk.blocks:
            tokens, keys_values = block(tokens)
            view.hidden_states.append(tokens)
            view.keys_values.append(keys_values)
        return view

    def score(self, view: LowResView, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """How much every place matters, `(B, h0, w0)` probabilities (PS3 §3.2).

        Args:
            prompt: `(B, hidden_size)`, what to look for; by default what generally matters (bottom-up).
        """
        width = self.config.hidden_size
        if view.place_features is None:
            chosen = [view.hidden_states[layer] for layer in self.config.select_based_on_layer]
            # scores of all scales are those of the first: the other groups would be computed for nothing
            features = self.selection_feature_proj(torch.cat(chosen, -1), width)
            side = self.config.ps3_scales[0] // self.config.patch_size
            view.place_features = features.transpose(1, 2).unflatten(2, (side, side))
        places: Any = view.place_features
        if prompt is None:
            prompt = self.prior_prompt.expand(len(places), -1)
        if prompt.shape != places.shape[:2]:
            size = tuple(places.shape[:2])
            raise ValueError(f"prompt must be {size}, a row for every picture, got {tuple(prompt.shape)}")
        prompt = prompt.to(places.dtype)
        logits = place_logits(places, prompt)
        if self.config.highres_selection_feature:
            if view.conv_features is None:
                pixels = view.pyramid.resized(CONV_INPUT_SIZE, CONV_INPUT_SIZE)
                view.conv_features = self.highres_selection_feature_module(pixels)
            out = self.config.highres_selection_module_out_dim
            wanted = first_outputs(self.prompt_proj_for_highres, prompt, out)
            fine = place_logits(view.conv_features, wanted)
            logits = (logits + nn.functional.adaptive_max_pool2d(fine, places.shape[2:])) / 2
        return to_probabilities(logits)

    def look(self, view: LowResView, chosen: list[torch.Tensor], num_blocks: int | None = None) -> list[torch.Tensor]:
        """One look at chosen patches: the outputs of the first `num_blocks` blocks, `(B, patches, D)` each.

        Args:
            chosen: for each high-resolution scale row-major indices, `(B, count)`.
        """
        embedded = [
            self.trunk.patch_embed.embed_chosen(view.pyramid.at_scale(number), indices)
            + self._positions(view, number, indices)
            for number, indices in enumerate(chosen)
            if indices.shape[1]
        ]
        tokens, outputs = torch.cat(embedded, 1), []
        for block, seen in list(zip(self.trunk.blocks, view.keys_values))[:num_blocks]:
            tokens, _ = block(tokens, seen)
            outputs.append(tokens)
        return outputs

    def _positions(self, view: LowResView, number: int, indices: torch.Tensor) -> torch.Tensor:
        """Positions of patches of a high-resolution scale, `(B, count) -> (B, count, D)`."""
        rows, columns = view.pyramid.grids[number]
        positions = self.trunk.positions(rows, columns, indices)
        if self.config.separate_pos_emb:
            side = self.config.ps3_scales[number + 1] // self.config.patch_size
            positions = positions + self.pos_emb_residual[number][0, indices // columns * side + indices % columns]
        return positions

    def forward(
        self,
        pixel_values: torch.Tensor,
        prompt: torch.Tensor | None = None,
        num_look_close: int | str | None = None,
        num_token_look_close: int | str | None = None,
        select_num_each_scale: list[int] | None = None,
        only_select_first_n_scale: int | None = None,
        smooth_selection_prob: bool = False,
        gt_selection_maps: torch.Tensor | None = None,
    ) -> Ps3Output:
        """See `Ps3Model.forward`."""
        if num_look_close is None and num_token_look_close is None:
            num_look_close = 1
        num_highres = len(self.config.ps3_scales) - 1
        check_looks(
            num_look_close, num_token_look_close, num_highres, only_select_first_n_scale, select_num_each_scale
        )
        view = self.see_low_res(pixel_values)
        grids = view.pyramid.grids
        probs = at_grids(self.score(view, prompt), grids, gt_selection_maps, smooth_selection_prob)
        plan = plan_looks(
            [rows * columns for rows, columns in grids],
            select_num_each_scale or self.config.look_budget,
            num_look_close,
            num_token_look_close,
            only_select_first_n_scale,
        )
        looks = list(choose_patches(probs, plan))
        if not looks:
            return Ps3Output(view.hidden_states[-1], tuple(view.hidden_states), None, probs, [])
        order = gather_order(looks, grids)
        seen = [self.look(view, chosen) for chosen in looks]
        hidden_states = tuple(
            torch.cat([low, in_order([outputs[layer] for outputs in seen], order)], 1)
            for layer, low in enumerate(view.hidden_states)
        )
        return Ps3Output(hidden_states[-1], hidden_states, selection_maps(looks, probs), probs, looks)


def gather_order(looks: list[list[torch.Tensor]], grids: list[tuple[int, int]]) -> torch.Tensor:
    """`(B, patches of all looks)`: where the tokens, look after look, stand when sorted by scale, then row by row."""
    offsets = [sum(rows * columns for rows, columns in grids[:number]) for number in range(len(grids))]
    return torch.cat([own + start for chosen in looks for own, start in zip(chosen, offsets)], 1).argsort(1)


def in_order(tokens: list[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """Tokens of every look, `(B, count, D)`, as `gather_order` says."""
    joined = torch.cat(tokens, 1)
    return joined.gather(1, order.unsqueeze(-1).expand(-1, -1, joined.shape[-1]))


def selection_maps(looks: list[list[torch.Tensor]], probs: list[torch.Tensor]) -> list[torch.Tensor]:
    """For each scale `(B, h, w)`, 1 where a look took the patch, in the dtype of the probabilities."""
    maps = []
    for number, own in enumerate(probs):
        chosen = torch.cat([look[number] for look in looks], 1)
        flat = torch.zeros_like(own).flatten(1).scatter(1, chosen, 1.0)
        maps.append(flat.view_as(own))
    return maps
