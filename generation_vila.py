"""What `generate()` adds to transformers' own: continued chats with media, and prompt lookup beside placeholders."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation import CandidateGenerator, PromptLookupCandidateGenerator

from .cache_vila import grow_in_place

# modality -> names of its tensors
MEDIA_INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class VilaGenerationMixin(GenerationMixin):
    """For a model whose base model has `media_sizes` and `get_placeholder_mask`."""

    config: Any
    model: Any

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`; with `past_key_values` of earlier turns, their media may be passed again.

        A continued chat is processed as a whole, media of earlier turns included. What lies in the cache is not
        encoded a second time. `tokenizer`, which `stop_strings` need, may be the processor, as servers pass it.

        Raises:
            ValueError: if the prompt is longer than the language model's context, or placeholders and media differ.
        """
        if (tokenizer := kwargs.get("tokenizer")) is not None:
            kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
        input_ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        check_context(self.config.text_config, [input_ids, kwargs.get("inputs_embeds")], mask)
        cache, cached = kwargs.get("past_key_values"), 0
        # a mask that is longer than the ids says that they are those of the new turn alone
        if input_ids is not None and isinstance(cache, Cache) and (mask is None or mask.shape == input_ids.shape):
            cached = cache.get_seq_length()
        for modality, (pixels, grid) in MEDIA_INPUTS.items():
            if input_ids is not None and kwargs.get(pixels) is not None:
                kwargs[pixels], kwargs[grid] = self._drop_cached(
                    modality, input_ids, cached, kwargs[pixels], kwargs.get(grid)
                )
            if kwargs.get(pixels) is None:
                # GenerationMixin encodes what is named, even None
                kwargs.pop(pixels, None)
                kwargs.pop(grid, None)
                if input_ids is not None and not kwargs.get("mm_encoder_outputs"):
                    self.model.get_placeholder_mask(input_ids[:, cached:], torch.empty(0), modality)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> bool:
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        grow_in_place(model_kwargs.get("past_key_values"))
        return prepared

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        """`GenerationMixin`'s; prompt lookup reads logits at ids of the prompt, which may be placeholders."""
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        if isinstance(generator, PromptLookupCandidateGenerator):
            last_id = max(self.config.image_token_id, self.config.video_token_id)
            generator.vocab_size = max(self.config.text_config.vocab_size, last_id + 1)
        return generator

    def _drop_cached(
        self,
        modality: str,
        input_ids: torch.Tensor,
        cached: int,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The pixels and grids of the media whose placeholders lie behind the first `cached` positions."""
        placeholders = input_ids == getattr(self.config, f"{modality}_token_id")
        if cached == 0 or cached >= input_ids.shape[1] or not placeholders[:, :cached].any():
            return pixel_values, grid_thw
        sizes = self.model.media_sizes(modality, pixel_values, grid_thw)
        is_new = list(media_behind(placeholders, cached, [tokens for _, tokens in sizes]))
        kept = [part for part, new in zip(pixel_values.split([tiles for tiles, _ in sizes]), is_new) if new]
        if not kept:
            return None, None
        if grid_thw is not None:
            grid_thw = grid_thw[torch.tensor(is_new, device=grid_thw.device)]
        return torch.cat(kept), grid_thw


def check_context(config: Any, prompts: list[torch.Tensor | None], mask: Any) -> None:
    """Refuses a prompt that is longer than the language model was made for, unless its rope is scaled.

    Args:
        config: the language model's.
        prompts: `(batch, sequence, ...)`.
        mask: `(batch, positions)`, earlier turns in the cache included.
    """
    limit = getattr(config, "max_position_embeddings", None)
    is_scaled = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    length = max((prompt.shape[1] for prompt in prompts if prompt is not None), default=0)
    is_plain = isinstance(mask, torch.Tensor) and mask.ndim == 2
    if limit is None or is_scaled or max(length, mask.shape[1] if is_plain else 0) <= limit:
        return
    if is_plain:
        length = int(mask.sum(1).max())  # without padding
    if length > limit:
        raise ValueError(
            f"the prompt has {length} tokens, more than the {limit} of the language model's context "
            "(config.text_config.max_position_embeddings): shorten it, or pass fewer pictures or frames"
        )


def media_behind(placeholders: torch.Tensor, cached: int, tokens: list[int]) -> Iterator[bool]:
    """For every picture or video, row by row, whether its placeholders start at position `cached` or later.

    Args:
        placeholders: `(batch, sequence)` mask.
        tokens: placeholders of each medium, in order.

    Raises:
        ValueError: if the cache ends inside a medium, or there are more placeholders than media.
    """
    sizes = iter(tokens)
    for row in placeholders:
        total, inside, start = int(row.sum()), int(row[:cached].sum()), 0
        while start < total:
            size = next(sizes, None)
            if size is None:
                raise ValueError(f"input_ids has more placeholders than the {len(tokens)} pictures or videos")
            if start < inside < start + size:
                raise ValueError("past_key_values ends inside a picture: it can only be continued between pictures")
            yield start >= inside
            start += size
