"""VILA-HD: reads the question over a small view of the picture, then looks closely where the answer may be (top-down).

- The low-resolution pass, the scores and the prompt's beginning are computed once; only what is seen closely is new.
- Features of chosen patches are inserted behind the placeholders of their picture, in `forward` and in `generate`.
- Everything behind the insertion is ordinary VILA.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .attention_vila import set_default_attention
from .configuration_vila_hd import VilaHDConfig
from .encoder_ps3 import Ps3VisionModel, init_ps3_weights
from .generation_vila_hd import VilaHDGenerationMixin, as_encoded
from .looking_vila_hd import Looked, LookOptions, VilaHDLooking
from .modeling_vila import (
    VilaCausalLMOutputWithPast,
    VilaForConditionalGeneration,
    VilaModel,
    VilaPreTrainedModel,
)
from .vision_vila_hd import VilaHDProjector, check_selection_maps, selection_loss
from .weight_names_vila import register_weight_names

register_weight_names("vila_hd")


@dataclass
class VilaHDCausalLMOutputWithPast(VilaCausalLMOutputWithPast):
    r"""
    logits: `(batch, positions, vocab_size)` of the prompt with the features of what was looked at, padded on the left.
    selection_loss: unweighted, if `gt_selection_maps` were given.
    selection_maps, selection_probs: for each high-resolution scale `(pictures, h, w)`: what was looked at, and by
        which chance it was chosen.
    top_down_prompt: `(prompts with pictures, channels)`, what the question makes the encoder look for.
    """

    selection_loss: torch.Tensor | None = None
    selection_maps: list[torch.Tensor] | None = None
    selection_probs: list[torch.Tensor] | None = None
    top_down_prompt: torch.Tensor | None = None


class VilaHDModel(VilaHDLooking, VilaModel):
    """VILA-HD without the language modelling head; on its own it sees pictures at low resolution."""

    config: VilaHDConfig
    config_class = VilaHDConfig
    vision_tower: Ps3VisionModel
    multi_modal_projector: VilaHDProjector

    def __init__(self, config: VilaHDConfig):
        VilaPreTrainedModel.__init__(self, config)
        set_default_attention(config.vision_config, config.text_config)
        self.vision_tower = Ps3VisionModel(config.vision_config, has_pooling=False)
        self.multi_modal_projector = VilaHDProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._keys_to_ignore_on_load_unexpected = [r"vision_tower\.trunk\.(attn_pool|norm|siglip_proj)\."]
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Pictures at low resolution.

        Args:
            pixel_values: `(pictures, 3, height, width)` at the largest scale.

        Returns:
            Output whose `pooler_output` is a list with one `(tokens, hidden_size)` tensor per picture.
        """
        features = [row for view in self.see(pixel_values) for row in self.project_low_res(view)]
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def _encode_zero_tile(self) -> torch.Tensor:
        side, weight = self.config.vision_config.input_size, self.vision_tower.prior_prompt
        picture = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
        options = LookOptions(num_look_close=1, look_close_mode="after_image").completed(self.config)
        view = self.vision_tower.see_low_res(picture)
        blocks, _, probs, _ = self._look_at(view, None, options, None)
        features = self.project_low_res(view)
        used = [features, blocks[0], probs[0]]
        if self.config.top_down_prompt_head_type is not None:
            used.append(self.multi_modal_projector.top_down_prompt_head(features[:, 0]))
        return torch.stack([part.sum() for part in used]).sum() * 0


class VilaHDForConditionalGeneration(VilaHDGenerationMixin, VilaForConditionalGeneration):
    """VILA-HD for answering and fine-tuning."""

    config: VilaHDConfig
    config_class = VilaHDConfig
    model_class = VilaHDModel
    # the selection loss is a mean over the pictures of a batch: Trainer averages, it does not divide by tokens
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_ps3_weights(module, 0.02)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        gt_selection_maps: torch.Tensor | None = None,
        num_look_close: int | str | None = None,
        num_token_look_close: int | str | None = None,
        select_num_each_scale: list[int] | None = None,
        look_close_mode: str | None = None,
        smooth_selection_prob: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VilaHDCausalLMOutputWithPast:
        """See `VilaForConditionalGeneration.forward`; of the look options, see `LookOptions`.

        Args:
            input_ids: `(batch, sequence)` with placeholders for the low-resolution view of every picture.
            labels: of the same shape; what is inserted is not a target.
            gt_selection_maps: `(pictures, height, width)`, above 0 where the model should look; a map of zeros or less
                is no target.

        Raises:
            ValueError: for packed rows, an option that makes no sense, or placeholders or maps that do not fit the
                pictures.
        """
        ordinary = {
            "past_key_values": past_key_values,
            "logits_to_keep": logits_to_keep,
            "mm_token_type_ids": mm_token_type_ids,
            **kwargs,
        }
        if pixel_values is None or input_ids is None:
            output = super().forward(
                input_ids,
                pixel_values,
                image_grid_thw,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=without_empty(labels),
                mm_encoder_outputs=mm_encoder_outputs,
                **ordinary,
            )
            return VilaHDCausalLMOutputWithPast(**output)
        if position_ids is not None:
            raise ValueError("packed rows and position_ids do not go with looking closely, which moves positions")
        if gt_selection_maps is not None:
            check_selection_maps(gt_selection_maps, len(pixel_values))
        options = LookOptions(
            num_look_close, num_token_look_close, select_num_each_scale, look_close_mode, smooth_selection_prob
        ).completed(self.config)
        use_gt = self.training and self.config.select_gt_in_training
        # the prefix is computed a second time here: logits of all positions are asked for, which no cache holds
        looked = self.model.look_closely(
            input_ids, attention_mask, pixel_values, options, None, gt_selection_maps if use_gt else None
        )
        batch = looked.batch
        targets: Any = None
        if labels is not None:
            inserted = batch.columns < 0
            targets = without_empty(labels.gather(1, batch.columns.clamp(min=0)).masked_fill(inserted, -100))
        output = super().forward(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=targets,
            mm_encoder_outputs=as_encoded(looked.features),
            **ordinary,
        )
        if labels is not None and targets is None:
            output.loss = output.logits.float().sum() * 0
        return self._with_selection(output, looked, gt_selection_maps)

    def _with_selection(
        self, output: VilaCausalLMOutputWithPast, looked: Looked, gt_selection_maps: torch.Tensor | None
    ) -> VilaHDCausalLMOutputWithPast:
        result = VilaHDCausalLMOutputWithPast(
            **output,
            selection_maps=looked.selection_maps,
            selection_probs=looked.selection_probs,
            top_down_prompt=looked.top_down_prompt,
        )
        if gt_selection_maps is not None and looked.raw_probs is not None:
            result.selection_loss = selection_loss(looked.raw_probs, gt_selection_maps)
            if self.config.token_selection_loss_weight:
                weighted = self.config.token_selection_loss_weight * result.selection_loss
                result.loss = weighted if result.loss is None else result.loss + weighted
        if self.training and result.loss is not None and looked.raw_probs is not None:
            # data-parallel processes wait for the gradients of all weights, also of those that chose for nothing
            unused = (
                sum(scale.float().sum() for scale in looked.raw_probs) + self.model.vision_tower.prior_prompt.sum()
            )
            result.loss = result.loss + unused * 0
        return result


def without_empty(labels: torch.Tensor | None) -> torch.Tensor | None:
    """Labels, or None if not one of them is a target: the mean over nothing is no number."""
    return None if labels is None or not (labels != -100).any() else labels


__all__ = ["VilaHDForConditionalGeneration", "VilaHDModel"]
