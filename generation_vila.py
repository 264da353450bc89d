"""What `generate()` adds to transformers' own: long prompts, continued chats with media, and prompt lookup beside
placeholders.

- A long prompt goes through the language model in chunks. Media are encoded when the chunk comes that they stand in,
  so that neither their pixels (see `FrameStream`) nor their features are held.
- What lies in the cache of an earlier turn is neither encoded nor computed again.
"""

from collections.abc import Iterator
from copy import copy
from itertools import accumulate, groupby
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation import CandidateGenerator, PromptLookupCandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .cache_vila import expect_tokens, grow_in_place
from .context_vila import context_length
from .memory_vila import LONG_PROMPT, PREFILL_CHUNK, MemoryPlan, loaded_bytes

# modality -> names of its tensors
MEDIA_INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
# prefills of more chunks than this show a progress bar
LONG_PREFILL_CHUNKS = 16
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class VilaGenerationMixin(GenerationMixin):
    """For a model whose base model has `media_sizes` and `get_placeholder_mask`."""

    config: Any
    model: Any
    # whether processes divide the first prompt of a chat among them, as `SequenceParallel` does: it goes through whole
    divides_prompt = False

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`; with `past_key_values` of earlier turns, their media may be passed again.

        A continued chat is processed as a whole, media of earlier turns included, or as what `continue_chat` of the
        processor gives. What lies in the cache is not encoded a second time; nor is what `mm_encoder_outputs` holds,
        `{"image": get_image_features(...)}`, of this chat or of another about the same media. `tokenizer`, which
        `stop_strings` need, may be the processor, as servers pass it.

        A prompt of more than 8,192 tokens is prefilled in chunks of 2,048, with `prefill_chunk_size` in others, or as
        a whole if that is None: the memory of a chunk takes the place of that of the prompt. Media of a single prompt
        are encoded chunk by chunk, too. Where processes share a prompt, each takes its part of it at once instead.

        Raises:
            ValueError: if the prompt is longer than the language model's context, or placeholders and media differ,
                or `prefill_chunk_size` is given where processes share the prompt.
        """
        if (tokenizer := kwargs.get("tokenizer")) is not None:
            kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
        input_ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        check_context(self, [input_ids, kwargs.get("inputs_embeds")], mask)
        cache, cached = kwargs.get("past_key_values"), 0
        # a mask that is longer than the ids says that they are those of the new turn alone
        if input_ids is not None and isinstance(cache, Cache) and (mask is None or mask.shape == input_ids.shape):
            cached = cache.get_seq_length()
        elif input_ids is not None and isinstance(cache, Cache) and mask is not None and mask.ndim == 2:
            check_cache(cache, input_ids, mask)
        for modality, (pixels, grid) in MEDIA_INPUTS.items():
            if input_ids is not None and kwargs.get(pixels) is not None:
                kwargs[pixels], kwargs[grid] = self._drop_cached(
                    modality, input_ids, cached, kwargs[pixels], kwargs.get(grid)
                )
            if input_ids is not None and cached and (kwargs.get("mm_encoder_outputs") or {}).get(modality) is not None:
                kwargs["mm_encoder_outputs"] = self._drop_cached_features(
                    modality, input_ids, cached, kwargs["mm_encoder_outputs"]
                )
            if kwargs.get(pixels) is None:
                # GenerationMixin encodes what is named, even None
                kwargs.pop(pixels, None)
                kwargs.pop(grid, None)
                if input_ids is not None and not kwargs.get("mm_encoder_outputs"):
                    self.model.get_placeholder_mask(input_ids[:, cached:], torch.empty(0), modality)
        if self.divides_prompt and not (isinstance(cache, Cache) and cache.get_seq_length()):
            if kwargs.get("prefill_chunk_size") is not None:
                raise ValueError("a prompt that is divided over the processes takes no prefill_chunk_size")
            kwargs["prefill_chunk_size"] = None
        elif input_ids is not None and kwargs.get("inputs_embeds") is None:
            self._prefill_in_chunks(input_ids[:, cached:], args, kwargs)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _prefill_in_chunks(self, input_ids: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        """Puts the chunk size of a long prompt, and media that are encoded chunk by chunk, into the arguments."""

        def option(name: str) -> Any:
            configs = [args[0] if args else kwargs.get("generation_config"), self.generation_config]
            values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            return next((value for value in values if value is not None), None)

        mask = kwargs.get("attention_mask")
        keeps_all = option("output_hidden_states") or option("output_attentions") or option("use_cache") is False
        is_plain = not keeps_all and (mask is None or mask.ndim == 2)
        if is_plain and "prefill_chunk_size" not in kwargs and input_ids.shape[1] > LONG_PROMPT:
            kwargs["prefill_chunk_size"] = option("prefill_chunk_size") or PREFILL_CHUNK
        is_single = len(input_ids) == (option("num_beams") or 1) == (option("num_return_sequences") or 1) == 1
        if not is_single or option("prefill_chunk_size") is None or kwargs.get("assistant_model") is not None:
            return
        for modality, (pixels, grid) in MEDIA_INPUTS.items():
            if kwargs.get(pixels) is None:
                continue
            pixel_values, grid_thw = kwargs.pop(pixels), kwargs.pop(grid, None)
            rows = sum(tokens for _, tokens in self.model.media_sizes(modality, pixel_values, grid_thw))
            self.model.get_placeholder_mask(input_ids, torch.empty(rows, 0), modality)
            stream = self.model.stream_features(modality, pixel_values, grid_thw)
            kwargs["mm_encoder_outputs"] = {**(kwargs.get("mm_encoder_outputs") or {}), modality: Streamed(stream)}

    def _prefill(
        self,
        input_ids: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """`GenerationMixin`'s; in chunks, the cache makes room for all of them at once, and every chunk is given, or
        made, the features of its own placeholders.
        """
        size, encoded = generation_config.prefill_chunk_size, model_kwargs.get("mm_encoder_outputs")
        cache = model_kwargs.get("past_key_values")
        mask, others = model_kwargs.get("attention_mask"), ("inputs_embeds", "pixel_values", "pixel_values_videos")
        is_text = (mask is None or mask.ndim == 2) and all(model_kwargs.get(name) is None for name in others)
        if size is None or cache is None or not (encoded or is_text) or not is_first_iteration:
            return super()._prefill(  # type: ignore[misc]
                input_ids, generation_config, model_kwargs, is_first_iteration
            )
        # every chunk is a prefill of its own
        config = copy(generation_config)
        config.prefill_chunk_size, config._mask_length = None, -1
        past = cache.get_seq_length()
        seen = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        input_ids = input_ids[:, past:] if seen == input_ids.shape[1] else input_ids
        readers = {
            modality: row_readers(output.pooler_output, input_ids == getattr(self.config, f"{modality}_token_id"))
            for modality, output in (encoded or {}).items()
            if output is not None
        }
        total, outputs = input_ids.shape[1], None
        with logging.tqdm(
            total=total, desc="Prefill", unit="token", disable=total <= LONG_PREFILL_CHUNKS * size
        ) as bar:
            for start in range(0, total, size):
                ids = input_ids[:, start : start + size]
                expect_tokens(cache, past + total)
                own = self._chunk_kwargs(ids, past + start, model_kwargs, readers)
                outputs = super()._prefill(ids, config, own, is_first_iteration)  # type: ignore[misc]
                bar.update(ids.shape[1])
        return outputs

    def _chunk_kwargs(
        self, ids: torch.Tensor, past: int, model_kwargs: dict[str, Any], readers: dict[str, list["RowReader"]]
    ) -> dict[str, Any]:
        """What one chunk of a prompt is prefilled with: masks and types up to its end, and its features."""
        own, end = dict(model_kwargs), past + ids.shape[1]
        for name in ("attention_mask", *TOKEN_TYPES):
            if own.get(name) is not None:
                own[name] = own[name][..., :end]
        if own.get("position_ids") is not None:
            own["position_ids"] = own["position_ids"][..., past:end]
        own["mm_encoder_outputs"] = {}
        for modality, rows in readers.items():
            counts = (ids == getattr(self.config, f"{modality}_token_id")).sum(1).tolist()
            if sum(counts):
                features = [part for reader, count in zip(rows, counts) for part in reader.take(count)]
                own["mm_encoder_outputs"][modality] = BaseModelOutputWithPooling(
                    pooler_output=features  # type: ignore[arg-type]
                )
        return own

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
        if not any(is_new):
            return None, None
        if grid_thw is not None:
            grid_thw = grid_thw[torch.tensor(is_new, device=grid_thw.device)]
        ends = list(accumulate(tiles for tiles, _ in sizes))
        runs = [list(run) for new, run in groupby(range(len(sizes)), key=is_new.__getitem__) if new]
        kept = [pixel_values[ends[run[0]] - sizes[run[0]][0] : ends[run[-1]]] for run in runs]
        if len(kept) == 1:
            return kept[0], grid_thw
        return (torch.cat(kept) if isinstance(pixel_values, torch.Tensor) else sum(kept[1:], kept[0])), grid_thw

    def _drop_cached_features(
        self, modality: str, input_ids: torch.Tensor, cached: int, encoded: dict[str, Any]
    ) -> dict[str, Any]:
        """The features of the media whose placeholders lie behind the first `cached` positions; they may be those."""
        features = list(encoded[modality].pooler_output)
        placeholders = input_ids == getattr(self.config, f"{modality}_token_id")
        if sum(map(len, features)) == placeholders[:, cached:].sum():
            return encoded
        is_new = media_behind(placeholders, cached, [len(rows) for rows in features])
        kept = [rows for rows, new in zip(features, is_new) if new]
        others = {name: output for name, output in encoded.items() if name != modality}
        if not kept:
            return others
        return {**others, modality: BaseModelOutputWithPooling(pooler_output=kept)}  # type: ignore[arg-type]


class Streamed:
    """In place of a `BaseModelOutputWithPooling`: features that are encoded as they are asked for, once.

    Args:
        pooler_output: gives `(rows, hidden_size)` tensors in order.
    """

    def __init__(self, pooler_output: Iterator[torch.Tensor]):
        self.pooler_output = pooler_output


class RowReader:
    """Hands out feature rows in order, however they are divided into tensors."""

    def __init__(self, parts: Iterator[torch.Tensor]):
        self.parts, self.rest = parts, torch.empty(0)

    def take(self, count: int) -> Iterator[torch.Tensor]:
        """Tensors of `count` rows together."""
        while count > 0:
            if len(self.rest) == 0:
                self.rest = next(self.parts)
            part, self.rest = self.rest[:count], self.rest[count:]
            count -= len(part)
            yield part


def row_readers(features: Any, placeholders: torch.Tensor) -> list[RowReader]:
    """A reader for every row of a batch, whose `(batch, sequence)` placeholders the features stand for in order.

    Raises:
        ValueError: if there are more or fewer features than placeholders.
    """
    if isinstance(features, Iterator):
        return [RowReader(features)]
    counts, parts = placeholders.sum(1).tolist(), list(features)
    if sum(counts) != sum(map(len, parts)):
        raise ValueError(f"{sum(map(len, parts))} features are given for {sum(counts)} placeholders")
    if len(counts) == 1:
        return [RowReader(iter(parts))]
    return [RowReader(iter([rows])) for rows in torch.cat(parts).split(counts)]


def check_context(model: Any, prompts: list[torch.Tensor | None], mask: Any) -> None:
    """Refuses a prompt that is longer than the language model was made for, with a table of what would fit.

    Args:
        prompts: `(batch, sequence, ...)`.
        mask: `(batch, positions)`, earlier turns in the cache included.
    """
    limit = context_length(model.config.text_config)
    length = max((prompt.shape[1] for prompt in prompts if prompt is not None), default=0)
    is_plain = isinstance(mask, torch.Tensor) and mask.ndim == 2
    if max(length, mask.shape[1] if is_plain else 0) <= limit:
        return
    if is_plain:
        length = int(mask.sum(1).max())  # without padding
    if length > limit:
        plan = MemoryPlan(model.config, loaded_bytes(model))
        raise ValueError(
            f"the prompt has {length} tokens, more than the {limit} of the language model's context "
            "(config.text_config.max_position_embeddings): shorten it, or pass fewer pictures or frames\n"
            + plan.table(plan.shown_frames())
        )


def check_cache(cache: Cache, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Refuses a new turn whose mask says that the cache holds more or fewer tokens than it does."""
    held, expected = int(cache.get_seq_length()), mask.shape[1] - input_ids.shape[1]
    if held != expected:
        raise ValueError(
            f"past_key_values holds {held} tokens, but attention_mask has room for {expected} before the new "
            f"{input_ids.shape[1]}: continue a chat with the cache and the output of its last turn"
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
