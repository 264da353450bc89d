"""PS3 as its checkpoints hold it: the encoder and, in most, a text tower that tells it what to look for."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple

from .attention_vila import set_default_attention
from .configuration_ps3 import Ps3Config
from .encoder_ps3 import Ps3Output, Ps3PreTrainedModel, Ps3VisionModel
from .selection_ps3 import at_grids, choose_patches, plan_looks, resize_map
from .text_ps3 import Ps3TextTower


@dataclass
class Ps3PooledOutput(ModelOutput):
    r"""
    pooler_output: `(B, pooling_size)`.
    bottomup_selection_probs, topdown_selection_probs: for each high-resolution scale `(B, h, w)`; those of the prompt
        are None if there is none.
    """

    pooler_output: torch.Tensor | None = None
    bottomup_selection_probs: list[torch.Tensor] | None = None
    topdown_selection_probs: list[torch.Tensor] | None = None


class Ps3Model(Ps3PreTrainedModel):
    """What a PS3 checkpoint holds: the encoder and, if its config has one, the text tower."""

    config: Ps3Config
    config_class = Ps3Config

    def __init__(self, config: Ps3Config):
        super().__init__(config)
        set_default_attention(config.vision_config)
        self.vision_model = Ps3VisionModel(config.vision_config)
        if config.text_config is not None:
            self.text_model = Ps3TextTower(config.text_config)
            self.logit_scale = nn.Parameter(torch.zeros(()))
            self.logit_bias = nn.Parameter(torch.zeros(()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Ps3TextTower):
            init.normal_(module.positional_embedding, std=0.02)
            if isinstance(module.text_projection, nn.Parameter):
                init.normal_(module.text_projection, std=0.02)
        elif module is self and self.config.text_config is not None:
            init.zeros_(self.logit_scale)
            init.zeros_(self.logit_bias)

    @can_return_tuple
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
        """Token features of pictures.

        Args:
            pixel_values: `(B, 3, height, width)` at the largest scale, square or not.
            prompt: `(B, hidden_size)`, what to look for, see `get_text_features`; by default what generally matters.
            num_look_close: looks, one by default; 0 for the low-resolution view only, `"all"` for as many as the
                budget of a look needs for all patches.
            num_token_look_close: patches to look at, instead of `num_look_close`; `"all"` for every one.
            select_num_each_scale: patches per look of each high-resolution scale, instead of the config's.
            only_select_first_n_scale: look at that many of the high-resolution scales.
            smooth_selection_prob: choose by averages over blocks.
            gt_selection_maps: `(B, height, width)`, above 0 where to look first.

        Raises:
            ValueError: for an option that makes no sense, or a tensor of another shape.
        """
        return self.vision_model(
            pixel_values,
            prompt,
            num_look_close,
            num_token_look_close,
            select_num_each_scale,
            only_select_first_n_scale,
            smooth_selection_prob,
            gt_selection_maps,
        )

    def feature_maps(self, features: torch.Tensor, selection_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Tokens as maps, `(B, D, h, w)` for every scale, the low-resolution one first; zero where nothing was seen.

        Args:
            features: `(B, tokens, D)`, a hidden state of `forward`.
            selection_maps: of the same output.

        Raises:
            ValueError: if tokens and maps differ in number.
        """
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        everywhere = features.new_ones(len(features), side, side)
        chosen = [scale.to(features.device) > 0 for scale in (everywhere, *selection_maps)]
        places = torch.cat([scale.flatten(1) for scale in chosen], 1)
        if places.sum() != features.shape[0] * features.shape[1]:
            raise ValueError(f"the maps choose {int(places.sum())} patches, features holds {features[..., 0].numel()}")
        dense = features.new_zeros(*places.shape, features.shape[-1])
        dense[places] = features.flatten(0, 1)
        parts = dense.split([scale[0].numel() for scale in chosen], 1)
        return [part.transpose(1, 2).unflatten(2, scale.shape[1:]) for part, scale in zip(parts, chosen)]

    def get_text_features(self, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
        """Texts -> `pooler_output`, `(B, projection_size)`, and `last_hidden_state`, the prompts `(B, hidden_size)`.

        Args:
            input_ids: `(B, context_length)`, padded.

        Raises:
            ValueError: if the checkpoint has no text tower, or a text is too long.
        """
        if self.config.text_config is None:
            raise ValueError("this checkpoint holds no text tower")
        embeds, prompt = self.text_model(input_ids)
        return BaseModelOutputWithPooling(last_hidden_state=prompt, pooler_output=embeds)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        prompt: torch.Tensor | None = None,
        gt_selection_maps: torch.Tensor | None = None,
        is_global_text: torch.Tensor | None = None,
        pool_gt_token_only: bool = False,
    ) -> Ps3PooledOutput:
        """One embedding per picture, in the space of the text embeddings: of one look, as in pre-training.

        Args:
            pixel_values, prompt, gt_selection_maps: as of `forward`.
            is_global_text: `(B,)`; where it is True, the low-resolution view is pooled instead.
            pool_gt_token_only: pool only patches inside of `gt_selection_maps`.

        Raises:
            ValueError: if the checkpoint holds no pooling.
        """
        model = self.vision_model
        view = model.see_low_res(pixel_values)
        grids = view.pyramid.grids
        bottom_up = at_grids(model.score(view), grids, gt_selection_maps)
        top_down = None if prompt is None else at_grids(model.score(view, prompt), grids, gt_selection_maps)
        plan = plan_looks([h * w for h, w in grids], model.config.look_budget, 1)
        (chosen,) = choose_patches(top_down or bottom_up, plan)
        mask = None
        if pool_gt_token_only and gt_selection_maps is not None:
            wanted = [resize_map(resize_map(gt_selection_maps, grids[0], "area"), grid, "nearest") for grid in grids]
            mask = torch.cat([(own > 0).flatten(1).gather(1, at) for own, at in zip(wanted, chosen)], 1)
        pooled = model.trunk.pool(model.look(view, chosen)[-1], mask)
        if is_global_text is not None and is_global_text.any():
            low = model.trunk.pool(view.hidden_states[-1])
            pooled = torch.where(is_global_text.to(pooled.device, torch.bool)[:, None], low, pooled)
        return Ps3PooledOutput(pooled, bottom_up, top_down)


__all__ = ["Ps3Model"]
