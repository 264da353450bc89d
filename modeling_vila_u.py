"""VILA-U: one language model that understands pictures and videos, and draws them.

- What it sees is quantised: the projector is given sums of codes, the same that it draws with.
- A picture is drawn position by position; at each, the depth transformer writes its codes one after the other.
- The encoder's layers, the codebooks and the language model are each built and loaded once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .codes_vila_u import VilaUPixelDecoder, VilaUResidualQuantizer
from .configuration_vila_u import VilaUConfig
from .depth_transformer_vila_u import VilaUDepthTransformer
from .generation_vila_u import VilaUGenerationMixin
from .modeling_vila import (
    VilaCausalLMOutputWithPast,
    VilaForConditionalGeneration,
    VilaModel,
    VilaPreTrainedModel,
    head_logits,
    is_placeholder,
)
from .weight_names_vila_u import register_weight_names_u, unused_names, with_module_names_u

register_weight_names_u()


@dataclass
class VilaUImageOutput(BaseModelOutputWithPooling):
    r"""
    pooler_output: projected features of each picture, a list of `(tokens, hidden_size)` tensors.
    codes: codes of each picture, `(pictures, tokens, depth)`.
    """

    codes: torch.Tensor | None = None


@dataclass
class VilaUCausalLMOutputWithPast(VilaCausalLMOutputWithPast):
    r"""
    text_loss: mean cross entropy of the text's ids, if there are `labels` of text.
    image_loss: mean cross entropy of the codes, over positions and depths, if there are `labels` of pictures.
    """

    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None


class VilaUPreTrainedModel(VilaPreTrainedModel):
    config: VilaUConfig
    config_class = VilaUConfig
    output_modalities: Any = ("image", "text")

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VilaUDepthTransformer):
            init.normal_(module.position_embedding, std=0.02)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See `VilaCompleteLoading.from_pretrained`; transformers makes every weight it loads one to be trained."""
        loaded = super().from_pretrained(*args, **kwargs)
        freeze_codes(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


def freeze_codes(model: torch.nn.Module) -> None:
    """Freezes codebooks and pixel decoder, which no loss of this model trains.

    Processes that exchange gradients would wait for theirs in vain.
    """
    for module in model.modules():
        if isinstance(module, (VilaUResidualQuantizer, VilaUPixelDecoder)):
            module.requires_grad_(False)


class VilaUModel(VilaUPreTrainedModel, VilaModel):  # type: ignore[misc]
    """VILA-U without the language modelling head; with everything between pixels and codes."""

    def __init__(self, config: VilaUConfig):
        super().__init__(config)
        self.quantizer = VilaUResidualQuantizer(config)
        self.pixel_decoder = VilaUPixelDecoder(config)
        self.depth_transformer = VilaUDepthTransformer(config)
        ignored = {*(self._keys_to_ignore_on_load_unexpected or ()), *unused_names(config)}
        self._keys_to_ignore_on_load_unexpected = ignored
        self.post_init()
        freeze_codes(self)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VilaUImageOutput:
        """Encodes and quantises pictures, see `VilaMediaEncoder.get_image_features`; with their codes.

        Args:
            pixel_values: `(pictures, 3, height, width)`.
        """
        self._tile_grids(pixel_values, image_grid_thw)
        features, codes = [], []
        for chunk in pixel_values.to(self.vision_tower.dtype).split(self._chunk_size):
            quantised, chunk_codes = self.quantizer(self._run_tower(chunk, **kwargs))
            features += self.multi_modal_projector(quantised).unbind()
            codes.append(chunk_codes)
        return VilaUImageOutput(pooler_output=features, codes=torch.cat(codes))  # type: ignore[arg-type]

    def _encode_tiles(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.quantizer(self._run_tower(pixel_values, **kwargs))[0]

    @torch.no_grad()
    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Codes of pictures.

        Args:
            pixel_values: `(pictures, 3, height, width)`, from the processor.

        Returns:
            `(pictures, tokens, depth)`, row by row.

        Raises:
            ValueError: if the pictures have another size than the tower takes.
        """
        side = self.config.vision_config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values must be (pictures, 3, {side}, {side}), got {tuple(pixel_values.shape)}: "
                "the processor makes them"
            )
        chunks = pixel_values.to(self.vision_tower.dtype).split(self._chunk_size)
        return torch.cat([self.quantizer(self._run_tower(chunk))[1] for chunk in chunks])

    @torch.no_grad()
    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Pixels of codes, a few pictures at a time.

        Args:
            codes: `(..., tokens, depth)`, of pictures or frames.

        Returns:
            `(..., 3, height, width)`, about -1 to 1, as `pixel_values` are.

        Raises:
            ValueError: if the shape is another one, or a code is none.
        """
        self.check_codes(codes)
        pictures = codes.reshape(-1, *codes.shape[-2:]).split(self._chunk_size)
        pixels = torch.cat([self.decode_features(self.quantizer.embed(chunk).sum(-2)) for chunk in pictures])
        return pixels.view(*codes.shape[:-2], *pixels.shape[1:])

    def decode_features(self, features_NTC: torch.Tensor) -> torch.Tensor:
        """Pixels of quantised features, `(N, tokens, channels) -> (N, 3, height, width)`."""
        return self.pixel_decoder(features_NTC.unflatten(1, self.config.code_grid))

    def check_codes(self, codes: torch.Tensor) -> None:
        """Refuses what cannot be decoded.

        Raises:
            ValueError: see `decode_codes`.
        """
        config = self.config
        shape = (config.num_tile_tokens, config.code_depth)
        if codes.ndim < 3 or tuple(codes.shape[-2:]) != shape or not codes.numel():
            raise ValueError(
                f"codes must be (pictures, {shape[0]}, {shape[1]}), got {tuple(codes.shape)}: of a video, "
                f"(videos, frames, {shape[0]}, {shape[1]})"
            )
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be whole numbers, got {codes.dtype}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= config.codebook_size:
            raise ValueError(f"codes must be 0 to {config.codebook_size - 1}, got {low if low < 0 else high}")


class VilaUForConditionalGeneration(VilaUPreTrainedModel, VilaUGenerationMixin, VilaForConditionalGeneration):
    """VILA-U for answering, drawing and fine-tuning."""

    model_class = VilaUModel
    # the loss has two means: `Trainer` must not divide their sum by the number of all labels
    accepts_loss_kwargs = False

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(with_module_names_u(state_dict), strict, assign)

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `VilaUModel.encode_image`."""
        return self.model.encode_image(pixel_values)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """See `VilaUModel.decode_codes`."""
        return self.model.decode_codes(codes)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VilaUCausalLMOutputWithPast:
        """See `VilaForConditionalGeneration.forward`.

        Args:
            labels: `(batch, sequence)` next-token targets; -100 is ignored. At a placeholder,
                `config.image_token_id` says that the picture is to be drawn: its codes are the targets there. The loss
                is the mean over text plus the mean over codes (VILA-U §3.3).
        """
        if labels is not None and pixel_values is not None and not mm_encoder_outputs:
            encoded = self.model.get_image_features(pixel_values, image_grid_thw, return_dict=True)
            mm_encoder_outputs, pixel_values, image_grid_thw = {"image": encoded}, None, None
        kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = head_logits(self.lm_head, slice_logits_to_keep(hidden, logits_to_keep))
        text_loss = image_loss = loss = None
        if labels is not None:
            text_loss = self._text_loss(logits, labels)
            image_loss = self._image_loss(hidden, input_ids, labels, (mm_encoder_outputs or {}).get("image"))
            loss = text_loss + image_loss
        return VilaUCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            text_loss=text_loss,
            image_loss=image_loss,
        )

    def _text_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the ids of text that are targets; 0 where there are none."""
        targets = labels.masked_fill(is_placeholder(labels, self.config), -100)[:, 1:].flatten().to(logits.device)
        scores = logits[:, :-1].float().flatten(0, 1)
        return F.cross_entropy(scores, targets, reduction="sum") / (targets != -100).sum().clamp(min=1)

    def _image_loss(
        self, hidden: torch.Tensor, input_ids: torch.Tensor | None, labels: torch.Tensor, encoded: Any
    ) -> torch.Tensor:
        """Mean over the codes of the pictures that are targets; 0 where there are none.

        Raises:
            ValueError: if a label asks for a code where the prompt has no picture.
        """
        image_id, model = self.config.image_token_id, self.model
        is_target = labels == image_id
        states = hidden[:, :-1][is_target[:, 1:].to(hidden.device)]
        codes = torch.zeros(0, self.config.code_depth, dtype=torch.long, device=hidden.device)
        if encoded is not None and input_ids is not None:
            drawn = is_target[(input_ids == image_id).to(labels.device)]
            codes = encoded.codes.flatten(0, 1)[drawn.to(encoded.codes.device)].to(hidden.device)
        if len(codes) != len(states):
            raise ValueError(
                f"labels ask for {len(states)} positions of pictures, of which the prompt has {len(codes)}: at a "
                "placeholder behind the first position, and there only, image_token_id may be a label"
            )
        if not len(states):
            # a gradient path, of zeros, for processes that wait for each other's gradients
            states, codes = hidden[:1, :1].flatten(0, 1), codes.new_zeros(1, self.config.code_depth)
            return model.depth_transformer(states, model.quantizer.embed(codes)).sum() * 0
        logits = model.depth_transformer(states, model.quantizer.embed(codes))
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


__all__ = ["VilaUForConditionalGeneration", "VilaUModel", "VilaUPreTrainedModel"]
