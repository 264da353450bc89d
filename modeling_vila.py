"""VILA-1.5, NVILA and LongVILA: a vision tower, a projector that merges patches, and a language model.

- Tower and language model are transformers' own; only the tower layers that are used exist.
- Static and dynamic S2 merge the maps of several scales between tower and projector.
- `input_ids` already holds one placeholder per feature row: the model fills them in and counts nothing.
- Placeholder ids may lie beyond the embedding table, which therefore never has to grow.

Shape letters: N tiles, L tokens of a tile, D tower channels, S side of a map in patches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.generation import CandidateGenerator, PromptLookupCandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_vila import VilaConfig
from .geometry_vila import TileGrid, crops_per_side, num_image_tokens, num_tiles, output_blocks, scale_splits
from .vision_vila import (
    VilaMultiModalProjector,
    build_vision_tower,
    concat_scales,
    merge_blocks,
    split_blocks,
    to_map,
)
from .weight_names_vila import register_weight_names

register_weight_names()


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


class VilaPreTrainedModel(PreTrainedModel):
    config: VilaConfig
    config_class = VilaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True


class VilaModel(VilaPreTrainedModel):
    """VILA without the language modelling head."""

    def __init__(self, config: VilaConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = VilaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        unused_layers = "|".join(
            str(i) for i in range(config.num_vision_layers, config.vision_config.num_hidden_layers)
        )
        self._keys_to_ignore_on_load_unexpected = [r"vision_tower\.(post_layernorm|layernorm|head)\."]
        if unused_layers:
            self._keys_to_ignore_on_load_unexpected += [rf"vision_tower\.encoder\.layers?\.({unused_layers})\."]
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes pictures.

        Args:
            pixel_values: `(N, 3, height, width)`, the tiles of all pictures one after the other.
            image_grid_thw: `(pictures, 3)`, `(1, rows, columns)` of every picture's tile grid; by default every tile
                is a picture of its own.

        Returns:
            Output whose `pooler_output` is a list with one `(tokens, hidden_size)` tensor per picture.

        Raises:
            ValueError: if the grids do not add up to the number of tiles.
        """
        grids = self._tile_grids(pixel_values, image_grid_thw)
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        if self.config.dynamic_s2:
            features = self._encode_dynamic_s2(pixel_values, grids, **kwargs)
        else:
            chunks = pixel_values.split(self.config.vision_chunk_size)
            encoded = torch.cat([self.multi_modal_projector(self._encode_tiles(c, **kwargs)) for c in chunks])
            tiles = encoded.split([num_tiles(grid) for grid in grids])
            features = [picture.flatten(0, 1) for picture in tiles]
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def _tile_grids(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None) -> list[TileGrid]:
        if image_grid_thw is None:
            return [TileGrid(1, 1)] * len(pixel_values)
        grids = [TileGrid(rows, cols) for _, rows, cols in image_grid_thw.tolist()]
        expected = sum(num_tiles(grid, self.config.dynamic_scales) for grid in grids)
        if expected != len(pixel_values):
            raise ValueError(f"image_grid_thw describes {expected} tiles, pixel_values holds {len(pixel_values)}")
        return grids

    def _run_tower(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`(N, 3, height, width) -> (N, L, D)` at the tower's own resolution."""
        features = self.vision_tower(pixel_values=pixel_values, **kwargs).last_hidden_state
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def _encode_tiles(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """One chunk of tiles -> what enters the projector; static S2 (S2-Wrapper) if the config says so."""
        if not self.config.s2:
            return self._run_tower(pixel_values, **kwargs)
        maps = []
        for scale in self.config.s2_scales:
            scaled = F.interpolate(pixel_values.float(), size=(scale, scale), mode="bicubic", align_corners=False)
            side = crops_per_side(scale, self.config.s2_max_split_size or self.config.s2_scales[0])
            grid = TileGrid(side, side)
            pictures = []
            for picture in scaled.to(pixel_values.dtype):
                crops = split_blocks(picture.permute(1, 2, 0), grid).permute(0, 3, 1, 2)
                chunks = crops.split(self.config.vision_chunk_size)
                crop_maps = to_map(torch.cat([self._run_tower(chunk, **kwargs) for chunk in chunks]))
                pictures.append(merge_blocks(crop_maps, grid))
            maps.append(torch.stack(pictures))
        return concat_scales(maps, self.config.s2_resize_output_to_scale_idx).flatten(1, 2)

    def _encode_dynamic_s2(
        self, pixel_values: torch.Tensor, grids: list[TileGrid], **kwargs: Any
    ) -> list[torch.Tensor]:
        """All tiles of all pictures -> projected features per picture (NVILA §3.1, dynamic S2)."""
        chunks = pixel_values.split(self.config.vision_chunk_size)
        tiles_NLD = torch.cat([self._run_tower(chunk, **kwargs) for chunk in chunks])
        features = []
        for tiles, grid in zip(tiles_NLD.split([num_tiles(g, self.config.s2_scales) for g in grids]), grids):
            blocks = output_blocks(grid, self.config.s2_scales, self.config.s2_resize_output_to_scale_idx)
            merged = self._merge_dynamic_scales(to_map(tiles), grid)
            # block by block, as in training: the projector's zero padding falls on every block's own edge
            projected = self.multi_modal_projector(split_blocks(merged, blocks).flatten(1, 2))
            features.append(merge_blocks(to_map(projected), blocks).flatten(0, 1))
        return features

    def _merge_dynamic_scales(self, maps_NSSD: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        """Tile maps of one picture, scale by scale -> one map with the channels of all scales."""
        scales = self.config.s2_scales
        if grid.area == 1:
            return maps_NSSD[0].repeat(1, 1, len(scales))
        splits = [TileGrid(k, k) for k in scale_splits(scales)[:-1]] + [grid]
        per_scale = maps_NSSD.split([split.area for split in splits])
        maps = [merge_blocks(scale_maps, split) for scale_maps, split in zip(per_scale, splits)]
        return concat_scales(maps, self.config.s2_resize_output_to_scale_idx)

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, features: torch.Tensor) -> torch.Tensor:
        """`(batch, sequence)` mask of the image placeholders; as many as `features`, `(rows, hidden_size)`, has rows.

        Raises:
            ValueError: if the two counts differ.
        """
        if input_ids is None:
            raise ValueError("pictures need `input_ids`: their placeholders cannot be found in `inputs_embeds`")
        mask = input_ids == self.config.image_token_id
        torch_compilable_check(
            mask.sum() == features.shape[0],
            lambda: f"input_ids has {int(mask.sum())} image placeholders, the pictures have {len(features)} features",
        )
        return mask

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
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VilaModelOutputWithPast:
        """One pass over text and pictures.

        Args:
            input_ids: `(batch, sequence)` with one `config.image_token_id` per feature row.
            pixel_values, image_grid_thw: see `get_image_features`.
            mm_token_type_ids: accepted for engines that pass all processor outputs on; positions are one-dimensional,
                so it has no effect.
            mm_encoder_outputs: `{"image": output of get_image_features}` if the pictures were encoded beforehand.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        encoded: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
            encoded = self.get_image_features(pixel_values, image_grid_thw, return_dict=True)

        embeds: Any = inputs_embeds if input_ids is None else self.embed_text(input_ids)
        if encoded is not None:
            features = torch.cat(list(encoded.pooler_output)).to(embeds.device, embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, features).to(embeds.device)
            embeds = embeds.masked_scatter(mask.unsqueeze(-1), features)
        elif input_ids is not None and past_key_values is None:
            self.get_placeholder_mask(input_ids, embeds[0, :0])

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
            image_hidden_states=None if encoded is None else encoded.pooler_output,
        )

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, with an arbitrary row at the placeholders: their ids need no row of their own."""
        return self.get_input_embeddings()(input_ids.masked_fill(is_placeholder(input_ids, self.config), 0))


class VilaForConditionalGeneration(VilaPreTrainedModel, GenerationMixin):
    """VILA for answering, captioning and fine-tuning: text and pictures in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VilaConfig):
        super().__init__(config)
        self.model = VilaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        """See `VilaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VilaCausalLMOutputWithPast:
        """See `VilaModel.forward`.

        Args:
            labels: `(batch, sequence)` next-token targets; -100 and placeholder ids are ignored.
            logits_to_keep: compute logits for the last that many positions only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            targets = labels.masked_fill(is_placeholder(labels, self.config), -100)
            loss = self.loss_function(
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

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`; with `past_key_values` of earlier turns, their pictures may be passed again.

        A continued chat is processed as a whole, pictures of earlier turns included. What lies in the cache is not
        encoded a second time.
        """
        input_ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        cache, cached = kwargs.get("past_key_values"), 0
        # a mask that is longer than the ids says that they are those of the new turn alone
        if input_ids is not None and isinstance(cache, Cache) and (mask is None or mask.shape == input_ids.shape):
            cached = cache.get_seq_length()
        if input_ids is not None and kwargs.get("pixel_values") is not None:
            kwargs |= self._drop_cached_pictures(
                input_ids, cached, kwargs["pixel_values"], kwargs.get("image_grid_thw")
            )
        if kwargs.get("pixel_values") is None:
            kwargs.pop("pixel_values", None)  # GenerationMixin encodes what is named, even None
            if input_ids is not None and not kwargs.get("mm_encoder_outputs"):
                self.model.get_placeholder_mask(input_ids[:, cached:], torch.empty(0))
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        """`GenerationMixin`'s; prompt lookup reads logits at ids of the prompt, which may be placeholders."""
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        if isinstance(generator, PromptLookupCandidateGenerator):
            last_id = max(self.config.image_token_id, self.config.video_token_id)
            generator.vocab_size = max(self.config.text_config.vocab_size, last_id + 1)
        return generator

    def _drop_cached_pictures(
        self, input_ids: torch.Tensor, cached: int, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None
    ) -> dict[str, torch.Tensor | None]:
        """The pictures whose placeholders lie behind the first `cached` positions."""
        placeholders = input_ids == self.config.image_token_id
        if cached == 0 or cached >= input_ids.shape[1] or not placeholders[:, :cached].any():
            return {}
        grids = self.model._tile_grids(pixel_values, image_grid_thw)
        new = list(self._pictures_behind(placeholders, cached, grids))
        per_picture = pixel_values.split([num_tiles(grid, self.config.dynamic_scales) for grid in grids])
        kept = [tiles for tiles, is_new in zip(per_picture, new) if is_new]
        if not kept:
            return {"pixel_values": None, "image_grid_thw": None}
        kept_grids = (
            None if image_grid_thw is None else image_grid_thw[torch.tensor(new, device=image_grid_thw.device)]
        )
        return {"pixel_values": torch.cat(kept), "image_grid_thw": kept_grids}

    def _pictures_behind(self, placeholders: torch.Tensor, cached: int, grids: list[TileGrid]) -> Iterator[bool]:
        """For every picture, row by row, whether its placeholders start at position `cached` or later."""
        config, sizes = self.config, iter(grids)
        for row in placeholders:
            total, inside = int(row.sum()), int(row[:cached].sum())
            start = 0
            while start < total:
                grid = next(sizes, None)
                if grid is None:
                    raise ValueError(f"input_ids has more image placeholders than the {len(grids)} pictures")
                end = start + num_image_tokens(
                    grid, config.num_tile_tokens, config.dynamic_scales, config.s2_resize_output_to_scale_idx
                )
                if start < inside < end:
                    raise ValueError(
                        "past_key_values ends inside a picture: it can only be continued between pictures"
                    )
                yield start >= inside
                start = end


def is_placeholder(ids: torch.Tensor, config: VilaConfig) -> torch.Tensor:
    """Mask of the ids that stand for media features."""
    return (ids == config.image_token_id) | (ids == config.video_token_id)


__all__ = ["VilaForConditionalGeneration", "VilaModel", "VilaPreTrainedModel"]
