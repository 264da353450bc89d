"""What `generate()` adds for VILA-U: pictures and videos, position by position, with classifier-free guidance.

- The prompt is prefilled once, whatever the number of samples; without guidance its negative is not run at all.
- At each position the depth transformer writes the codes one after the other, with a cache of its own.
- Nothing else is sampled: a picture has a fixed number of positions, and no end token is looked at.

Shape letters: R prompts, N samples of all prompts, D depth, H channels, K codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.modeling_outputs import ModelOutput

from .cache_vila import grow_in_place
from .context_vila import context_length
from .generation_vila import VilaGenerationMixin
from .sampling_vila_u import DRAWING_DEFAULTS, Sampling, check_count, check_number, code_filters

GENERATION_MODES = ("text", "image", "video")
DEFAULT_NUM_FRAMES = 8
MAX_FRAMES = 2**12
MAX_SAMPLES = 2**12


@dataclass
class VilaUDrawingOutput(ModelOutput):
    r"""
    sequences: codes, `(samples, tokens, depth)`, those of each prompt next to each other; of a video the tokens of all
        frames, one frame after the other.
    pixel_values: `(samples, 3, height, width)`, about -1 to 1; of a video `(samples, frames, 3, height, width)`.
    logits: with `output_logits=True` the guided logits before any filter, `(samples, tokens, depth, codebook_size)`.
    """

    sequences: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def join_left_padded(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, `(rows, length, H)`, and masks, `(rows, length)`, of all batches, padded on the left."""
    length = max(mask.shape[1] for _, mask in batches)
    embeds, masks = [], []
    for embed, mask in batches:
        missing = length - mask.shape[1]
        embeds.append(torch.cat([embed.new_zeros(len(embed), missing, embed.shape[2]), embed], dim=1))
        masks.append(torch.cat([mask.new_zeros(len(mask), missing), mask], dim=1))
    return torch.cat(embeds), torch.cat(masks)


class VilaUGenerationMixin(VilaGenerationMixin):
    """For a model whose base model has a `quantizer`, a `depth_transformer` and `decode_codes`."""

    generation_config: Any

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, generation_mode: str = "text", **kwargs: Any
    ) -> Any:
        """Answers or, with `generation_mode="image"` or `"video"`, draws; prompts come from the processor.

        Args of drawing, beside `input_ids`, `attention_mask` and those of pictures in the prompt:
            generation_mode: `"text"` is `VilaGenerationMixin.generate`.
            guidance_scale: how far samples are moved from the negative prompt, in logits (classifier-free guidance); 1
                does not run it at all.
            num_return_sequences: pictures per prompt, 1 unless a given `generation_config` says otherwise.
            num_frames: frames of a video, 8 by default.
            negative_prompt_ids, negative_prompt_attention_mask: `(1 or prompts, length)`; from the processor.
            do_sample, temperature, top_k, top_p: how codes are drawn; by default as the checkpoint's
                `generation_config.drawing` says. `logits_processor`: further filters of `(samples, codes)` logits.
            generator: a `torch.Generator` that the draws come from.
            streamer: its `put` is given each finished row of the pictures, `(samples, columns, depth)` codes, then its
                `end` is called; see `VilaUPictureStreamer`.
            output_logits: whether to return the guided logits.

        Returns:
            Ids of text, or a `VilaUDrawingOutput`.

        Raises:
            ValueError: for an unknown mode or option, a number that makes no sense, a prompt that does not ask for a
                picture, or one that is too long for the language model.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"unknown generation_mode {generation_mode!r}; known are {', '.join(GENERATION_MODES)}")
        if generation_mode == "text":
            if kwargs.get("negative_prompt_ids") is not None and kwargs.get("guidance_scale") is None:
                raise ValueError("these inputs ask for a picture or video: pass their generation_mode here too")
            return super().generate(inputs, *args, **kwargs)
        kwargs.setdefault("input_ids", inputs)
        if args:
            raise ValueError("arguments of drawing are given by name")
        return self._draw(generation_mode, self._num_frames(generation_mode, kwargs), **kwargs)

    def _num_frames(self, mode: str, kwargs: dict[str, Any]) -> int | None:
        """Frames of a video; None for a picture."""
        num_frames = kwargs.pop("num_frames", None)
        if mode == "video":
            return check_count("num_frames", DEFAULT_NUM_FRAMES if num_frames is None else num_frames, MAX_FRAMES)
        if num_frames is not None:
            raise ValueError("num_frames is for generation_mode='video'")
        return None

    def _draw(
        self,
        mode: str,
        num_frames: int | None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        num_return_sequences: int | None = None,
        guidance_scale: float | None = None,
        streamer: Any = None,
        output_logits: bool = False,
        **options: Any,
    ) -> VilaUDrawingOutput:
        """See `generate`."""
        sampling, default_scale = self._sampling(**options)
        scale = default_scale if guidance_scale is None else guidance_scale
        check_number("guidance_scale", scale, lambda value: value > 0, "a positive number")
        if num_return_sequences is None:
            num_return_sequences = getattr(options.get("generation_config"), "num_return_sequences", None) or 1
        samples = check_count("num_return_sequences", num_return_sequences, MAX_SAMPLES)
        tokens = self.config.num_tile_tokens * (num_frames or 1)
        prompts = [self._check_prompt(input_ids, attention_mask, mode, tokens, "input_ids")]
        if scale != 1:
            negative = negative_prompt_ids, negative_prompt_attention_mask
            prompts.append(self._check_prompt(*negative, mode, tokens, "negative_prompt_ids"))
            check_negative(prompts)
        embeds = [self.model.embed_text(ids) for ids, _ in prompts]
        self.model.get_placeholder_mask(prompts[0][0], embeds[0][0, :0], "video")
        features = embeds[0][0, :0]
        if pixel_values is not None:
            encoded = self.model.get_image_features(pixel_values, image_grid_thw, return_dict=True)
            features = torch.cat(list(encoded.pooler_output)).to(embeds[0])
        placeholders = self.model.get_placeholder_mask(prompts[0][0], features)
        embeds[0] = embeds[0].masked_scatter(placeholders.unsqueeze(-1), features)
        joined = join_left_padded([(embed, mask) for embed, (_, mask) in zip(embeds, prompts)])
        rows = sample_rows([len(mask) for _, mask in prompts], samples).to(joined[1].device)
        drawing = Drawing(self, *joined, rows, tokens, scale)
        codes, logits = drawing.run(sampling, streamer, output_logits)
        pictures = codes if num_frames is None else codes.unflatten(1, (num_frames, -1))
        return VilaUDrawingOutput(sequences=codes, pixel_values=self.model.decode_codes(pictures), logits=logits)

    def _sampling(
        self,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
        mm_token_type_ids: Any = None,
        use_cache: Any = None,
        return_dict_in_generate: Any = None,
        **options: Any,
    ) -> tuple[Sampling, float]:
        """How codes are chosen, and the guidance that is used if the call names none.

        `generate()`'s arguments win over a config that is given, that over the checkpoint's.
        """
        if unknown := sorted(set(options) - set(DRAWING_DEFAULTS)):
            raise ValueError(f"{', '.join(unknown)}: not for drawing")
        size = self.config.codebook_size
        own = getattr(self.generation_config, "drawing", None) or {}
        if not isinstance(own, dict) or not set(own) <= set(DRAWING_DEFAULTS):
            raise ValueError(f"generation_config.drawing may hold {', '.join(DRAWING_DEFAULTS)} only")
        chosen: dict[str, Any] = {**DRAWING_DEFAULTS, "top_k": min(DRAWING_DEFAULTS["top_k"], size), **own}
        given = {name: getattr(generation_config, name, None) for name in DRAWING_DEFAULTS}
        chosen |= {name: value for name, value in (*given.items(), *options.items()) if value is not None}
        filters = code_filters(size, chosen["temperature"], chosen["top_k"], chosen["top_p"])
        filters.extend(logits_processor or [])
        return Sampling(filters, bool(chosen["do_sample"]), generator), chosen["guidance_scale"]

    def _check_prompt(
        self, ids: torch.Tensor | None, mask: torch.Tensor | None, mode: str, tokens: int, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of prompts that end where a picture begins, and leave room for it."""
        if ids is None or ids.ndim != 2 or not ids.numel():
            raise ValueError(
                f"drawing needs {name}, (prompts, length): the processor makes them with generation_mode={mode!r}"
            )
        mask = torch.ones_like(ids) if mask is None else mask.to(ids)
        if mask.shape != ids.shape:
            raise ValueError(f"{name} has the shape {tuple(ids.shape)}, its mask {tuple(mask.shape)}")
        start = getattr(self.config, f"{mode}_start_token_id")
        if start is None:
            raise ValueError(f"this checkpoint draws no {mode}")
        if not (ids[:, -1] == start).all() or not mask[:, -1].all():
            raise ValueError(
                f"{name} must end with the token behind which a {mode} is drawn, padded on the left: the processor "
                f"makes such prompts with generation_mode={mode!r}"
            )
        length, limit = int(mask.sum(1).max()), context_length(self.config.text_config)
        if length + tokens - 1 > limit:
            raise ValueError(
                f"a prompt of {length} tokens and {tokens} of the {mode} exceed the {limit:.0f} of the language "
                "model's context: shorten it, or draw fewer frames"
            )
        return ids, mask


def check_negative(prompts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Keeps one row of negative prompts that are all the same: they need to be prefilled once.

    Raises:
        ValueError: if there are neither as many as prompts nor one.
    """
    (ids, _), (negative, mask) = prompts
    if (negative == negative[:1]).all() and (mask == mask[:1]).all():
        prompts[1] = negative[:1], mask[:1]
    elif len(negative) != len(ids):
        raise ValueError(f"there are {len(ids)} prompt(s), but {len(negative)} negative ones")


def sample_rows(counts: list[int], samples: int) -> torch.Tensor:
    """Which prefilled row each row of the drawing continues: the samples of every prompt, then their negatives.

    Args:
        counts: prefilled prompts and, with guidance, prefilled negative prompts.
    """
    rows = torch.arange(counts[0]).repeat_interleave(samples)
    if len(counts) == 1:
        return rows
    negative = rows if counts[1] == counts[0] else torch.zeros_like(rows)
    return torch.cat([rows, counts[0] + negative])


class Drawing:
    """One call's state: the language model's cache, and the hidden state that predicts the next position.

    Args:
        model: a `VilaUForConditionalGeneration`.
        embeds: prompts and negative prompts, `(R, length, H)`, and their `mask`, padded on the left.
        rows: the prompt that each row continues, see `sample_rows`.
        tokens: positions to draw.
        scale: of guidance; 1 for none.
    """

    def __init__(
        self, model: Any, embeds: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, tokens: int, scale: float
    ):
        self.model, self.tokens, self.scale = model.model, tokens, scale
        self.num_branches = 1 if scale == 1 else 2
        self.cache = DynamicCache(config=model.config.text_config)
        grow_in_place(self.cache)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        is_padded = not bool(mask.all())
        self.hidden = self._run(embeds, mask if is_padded else None, positions)[rows]
        self.cache.batch_select_indices(rows)
        self.next_position = positions[rows, -1:] + 1
        # the prompts' part and room for all that will be drawn
        self.mask = torch.cat([mask[rows], mask.new_ones(len(rows), tokens)], dim=1) if is_padded else None

    def run(self, sampling: Sampling, streamer: Any, output_logits: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes, `(samples, tokens, depth)`, and the logits if they are asked for."""
        columns = self.model.config.code_grid[1]
        drawn, logits = [], []
        for position in range(self.tokens):
            codes, features, own_logits = self._write_codes(sampling)
            drawn.append(codes)
            if output_logits:
                logits.append(own_logits)
            if streamer is not None and len(drawn) % columns == 0:
                streamer.put(torch.stack(drawn[-columns:], dim=1))
            if position + 1 < self.tokens:
                self._advance(features)
        if streamer is not None:
            streamer.end()
        return torch.stack(drawn, dim=1), torch.stack(logits, dim=1) if output_logits else None

    def _write_codes(self, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One position: codes, `(N, depth)`, their sum, `(N, channels)`, and logits, `(N, depth, codes)`."""
        quantizer, depth_transformer = self.model.quantizer, self.model.depth_transformer
        cache, codes, logits = DynamicCache(), [], []
        inputs, features = self.hidden, None
        for depth in range(self.model.config.code_depth):
            guided = self._guide(depth_transformer(inputs, depth=depth, cache=cache).float())
            logits.append(guided)
            codes.append(sampling.choose(guided))
            embedding = quantizer.embed_depth(codes[-1], depth)
            features = embedding if features is None else features + embedding
            inputs = self._branches(features)
        return torch.stack(codes, dim=1), features, torch.stack(logits, dim=1)  # type: ignore[return-value]

    def _guide(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of both branches, `(2 N, codes)` -> `(N, codes)` (Classifier-Free Diffusion Guidance, on logits)."""
        if self.num_branches == 1:
            return logits
        prompted, negative = logits.chunk(2)
        return negative + self.scale * (prompted - negative)

    def _branches(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same for the prompts and the negative prompts."""
        return tensor if self.num_branches == 1 else torch.cat([tensor] * self.num_branches)

    def _advance(self, features: torch.Tensor) -> None:
        """Shows the language model the position that was drawn."""
        embeds = self._branches(self.model.multi_modal_projector(features.unsqueeze(1)))
        mask = self.mask
        if mask is not None:
            mask = mask[:, : self.cache.get_seq_length() + 1]
        self.hidden = self._run(embeds, mask, self.next_position)
        self.next_position = self.next_position + 1

    def _run(self, embeds: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """Hidden state of the last position, `(rows, H)`."""
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[:, -1]


class VilaUPictureStreamer:
    """Shows pictures while they are drawn: a `streamer` for `generate()`.

    Args:
        model: the model that draws.
        show: called with `(samples, 3, height so far, width)` pixels, about -1 to 1, after every row of codes; of a
            video, those of the frame that is being drawn.
    """

    def __init__(self, model: Any, show: Callable[[torch.Tensor], None]):
        self.base, self.show = model.model, show
        self.rows: list[torch.Tensor] = []

    @torch.no_grad()
    def put(self, codes: torch.Tensor) -> None:
        """Takes one row, `(samples, columns, depth)`."""
        height, _ = self.base.config.code_grid
        if len(self.rows) == height:
            self.rows = []
        self.rows.append(self.base.quantizer.embed(codes).sum(-2))
        missing = [torch.zeros_like(self.rows[0])] * (height - len(self.rows))
        pixels = self.base.decode_features(torch.cat([*self.rows, *missing], dim=1))
        self.show(pixels[:, :, : pixels.shape[2] * len(self.rows) // height])

    def end(self) -> None:
        """Nothing is left to show."""


__all__ = ["VilaUDrawingOutput", "VilaUGenerationMixin", "VilaUPictureStreamer"]
