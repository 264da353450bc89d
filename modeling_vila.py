"""VILA-1.5, NVILA and LongVILA: a vision tower, a projector that merges patches, and a language model.

- Tower and language model are transformers' own; only the tower layers that are used exist.
- Static and dynamic S2 merge the maps of several scales between tower and projector.
- `input_ids` already holds one placeholder per feature row: the model fills them in and counts nothing.
- Placeholder ids may lie beyond the embedding table, which therefore never has to grow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .attention_vila import default_attention, register_cpu_attention, set_default_attention
from .configuration_vila import VilaConfig, first
from .encoding_vila import VilaMediaEncoder
from .generation_vila import VilaGenerationMixin
from .loss_vila import soft_time_loss
from .vision_vila import VilaMultiModalProjector, build_vision_tower
from .weight_loading_vila import VilaCompleteLoading
from .weight_names_vila import register_weight_names, with_module_names

register_cpu_attention()
register_weight_names()

PLURALS = {"image": "pictures", "video": "videos"}


@dataclass
class VilaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states: projected features of each picture, a list of `(tokens, hidden_size)` tensors.
    """

    image_hidden_states: list[torch.Tensor] | None = None


@dataclass
class VilaCausalLMOutputWithPast(ModelOutput):
    r"""
    loss: next-token cross entropy, if `labels` were given.
    logits: `(batch, kept positions, vocab_size)`.
    image_hidden_states: projected features of each picture, a list of `(tokens, hidden_size)` tensors.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: list[torch.Tensor] | None = None


class VilaPreTrainedModel(VilaCompleteLoading):
    config: VilaConfig
    config_class = VilaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        return super().get_correct_attn_implementation(requested_attention or default_attention(), *args, **kwargs)


class VilaModel(VilaPreTrainedModel, VilaMediaEncoder):
    """VILA without the language modelling head."""

    def __init__(self, config: VilaConfig):
        super().__init__(config)
        set_default_attention(config.vision_config, config.text_config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = VilaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        unused_layers = "|".join(
            str(i) for i in range(config.num_vision_layers, config.vision_config.num_hidden_layers)
        )
        # what is not built
        self._keys_to_ignore_on_load_unexpected = [r"vision_tower\.(post_layernorm|layernorm|head)\."]
        if unused_layers:
            self._keys_to_ignore_on_load_unexpected += [rf"vision_tower\.encoder\.layers?\.({unused_layers})\."]
        self.post_init()

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, features: torch.Tensor, modality: str = "image"
    ) -> torch.Tensor:
        """`(batch, sequence)` mask of the placeholders; as many as `features`, `(rows, hidden_size)`, has rows.

        Raises:
            ValueError: if the two counts differ.
        """
        if input_ids is None:
            raise ValueError(f"{modality}s need `input_ids`: placeholders cannot be found in `inputs_embeds`")
        mask = input_ids == getattr(self.config, f"{modality}_token_id")
        torch_compilable_check(
            mask.sum() == features.shape[0],
            lambda: (
                f"input_ids has {int(mask.sum())} {modality} placeholders, the {PLURALS[modality]} have "
                f"{len(features)} features"
            ),
        )
        return mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VilaModelOutputWithPast:
        """One pass over text and pictures.

        Args:
            input_ids: `(batch, sequence)` with one `config.image_token_id` per feature row.
            pixel_values, image_grid_thw: see `get_image_features`.
            pixel_values_videos, video_grid_thw: see `get_video_features`.
            position_ids: `(batch, sequence)`; without `attention_mask`, every restart at 0 begins another packed row
                that sees none of those before it.
            mm_token_type_ids: accepted for engines that pass all processor outputs on; positions are one-dimensional,
                so it has no effect.
            mm_encoder_outputs: `{"image": output of get_image_features, "video": ...}` if they were encoded before.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        encoded: dict[str, Any] = dict(mm_encoder_outputs or {})
        if encoded and (pixel_values is not None or pixel_values_videos is not None):
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)

        embeds: Any = inputs_embeds if input_ids is None else self.embed_text(input_ids)
        for modality in PLURALS:
            if encoded.get(modality) is not None:
                features = torch.cat(list(encoded[modality].pooler_output)).to(embeds.device, embeds.dtype)
                mask = self.get_placeholder_mask(input_ids, features, modality).to(embeds.device)
                embeds = embeds.masked_scatter(mask.unsqueeze(-1), features)
            elif input_ids is not None and past_key_values is None:
                self.get_placeholder_mask(input_ids, embeds[0, :0], modality)
        if not encoded and self._must_run_tower():
            embeds = embeds + self._encode_zero_tile().to(embeds.device, embeds.dtype)

        is_packed = attention_mask is None and position_ids is not None and past_key_values is None
        if self.training or is_packed:
            # rows packed into one: transformers keeps their attention apart only where there is no cache
            kwargs.setdefault("use_cache", False)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            **kwargs,
        )
        return VilaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=getattr(encoded.get("image"), "pooler_output", None),
        )

    def _must_run_tower(self) -> bool:
        """Whether a training step without media runs the tower and the projector all the same.

        Data-parallel processes exchange gradients, and sharding ones the weights too, of every part in every step:
        where one process had no media, the others would wait for it.
        """
        if not self.training:
            return False
        modules = [*self.vision_tower.modules(), *self.multi_modal_projector.modules()]
        weights = [weight for module in modules for weight in module.parameters(recurse=False)]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return True
        is_sharded = is_deepspeed_zero3_enabled() or any(hasattr(weight, "device_mesh") for weight in weights)
        return is_sharded or any(is_fsdp_managed_module(module) for module in modules)

    def _encode_zero_tile(self) -> torch.Tensor:
        """Zero, but with a gradient path (of zeros) to every weight that encodes media."""
        side = first(self.config.vision_config.image_size)
        tile = torch.zeros(1, 3, side, side, dtype=self.vision_tower.dtype, device=self.vision_tower.device)
        (features,) = self.get_image_features(tile, return_dict=True).pooler_output
        return features.sum() * 0

    def train(self, mode: bool = True) -> "VilaModel":
        """As for every module, but a frozen tower or projector stays as in inference (no dropout).

        A frozen language model does not: gradients pass through it on their way to the projector, and gradient
        checkpointing works in training mode only.
        """
        super().train(mode)
        for part in (self.vision_tower, self.multi_modal_projector):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, with an arbitrary row at the placeholders: their ids need no row of their own."""
        if max(self.config.image_token_id, self.config.video_token_id) < self.config.text_config.vocab_size:
            return self.get_input_embeddings()(input_ids)
        return self.get_input_embeddings()(input_ids.masked_fill(is_placeholder(input_ids, self.config), 0))


class VilaForConditionalGeneration(VilaPreTrainedModel, VilaGenerationMixin):
    """VILA for answering, captioning and fine-tuning: text and pictures in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # families with another base model name theirs
    model_class: Any = VilaModel

    def __init__(self, config: VilaConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for every module, and also under the names that `save_pretrained` writes: `Trainer` resumes with it."""
        return super().load_state_dict(with_module_names(state_dict), strict, assign)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        """See `VilaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        """See `VilaModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VilaCausalLMOutputWithPast:
        """See `VilaModel.forward`.

        Args:
            labels: `(batch, sequence)` next-token targets; -100 and placeholder ids are ignored. Time tokens are soft
                targets if `config.time_token_ids` names them.
            logits_to_keep: compute logits for the last that many positions only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = head_logits(self.lm_head, slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            targets = labels.masked_fill(is_placeholder(labels, self.config), -100)
            loss_function = self.loss_function
            if times := self.config.time_token_ids:
                loss_function = partial(soft_time_loss, time_token_ids=times, std=self.config.soft_ce_std)
            loss = loss_function(
                logits=logits, labels=targets, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return VilaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def head_logits(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states, `(..., hidden_size) -> (..., vocabulary)`.

    A CPU reads bfloat16 weights faster for two rows than for one, and a head's are the most that a new token reads at
    once: one row is doubled.
    """
    is_one = hidden.numel() == hidden.shape[-1] and not (torch.is_grad_enabled() and hidden.requires_grad)
    is_slow = type(head) is nn.Linear and hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16
    if is_one and is_slow and not torch.compiler.is_compiling():
        return head(hidden.reshape(1, -1).expand(2, -1))[:1].view(*hidden.shape[:-1], -1)
    return head(hidden)


def is_placeholder(ids: torch.Tensor, config: VilaConfig) -> torch.Tensor:
    """Mask of the ids that stand for media features."""
    return (ids == config.image_token_id) | (ids == config.video_token_id)


__all__ = ["VilaForConditionalGeneration", "VilaModel", "VilaPreTrainedModel", "head_logits"]
