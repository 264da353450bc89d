"""How VILA-HD looks: the options, the question that says what to look for, and the features of what was seen.

The language model reads the prompt once up to the question, pictures at low resolution. Its state there becomes the
encoder's prompt, and what it computed up to the first picture stays in the cache.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .cache_vila import GrowingLayer, grow_in_place
from .configuration_vila_hd import LOOK_CLOSE_MODES, VilaHDConfig
from .encoder_ps3 import LowResView, Ps3VisionModel, gather_order, in_order, selection_maps
from .prompts_vila_hd import PaddedRows, PromptRow, join, pad_rows, read_rows
from .selection_ps3 import at_grids, check_looks, choose_patches, plan_looks
from .vision_vila_hd import VilaHDProjector


@dataclass
class LookOptions:
    """How to look; None stands for the checkpoint's own choice.

    num_look_close: looks at every picture: 0 for the low-resolution view alone, `"all"` for as many as the budget of a
        look needs for all patches.
    num_token_look_close: patches per picture, instead of `num_look_close`; `"all"` for every one.
    select_num_each_scale: patches of one look at each high-resolution scale.
    look_close_mode: `"after_prompt"` or `"after_image"`.
    smooth_selection_prob: choose by averages over blocks of the picture.
    """

    num_look_close: int | str | None = None
    num_token_look_close: int | str | None = None
    select_num_each_scale: list[int] | None = None
    look_close_mode: str | None = None
    smooth_selection_prob: bool | None = None

    @classmethod
    def of(cls, source: Any) -> "LookOptions":
        """Those that an object has as attributes, as a `GenerationConfig` may."""
        return cls(**{own.name: getattr(source, own.name, None) for own in fields(cls)})

    def or_else(self, other: "LookOptions") -> "LookOptions":
        """With the other's choices where this has none; how much is looked at is one choice."""
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        has_number = self.num_look_close is not None or self.num_token_look_close is not None
        for own in fields(self):
            is_number = own.name in ("num_look_close", "num_token_look_close")
            if values[own.name] is None and not (is_number and has_number):
                values[own.name] = getattr(other, own.name)
        return LookOptions(**values)

    def completed(self, config: VilaHDConfig) -> "LookOptions":
        """With the checkpoint's choices.

        Raises:
            ValueError: for an option that makes no sense, or that the checkpoint cannot do.
        """
        num_looks, num_tokens = self.num_look_close, self.num_token_look_close
        if num_looks is None and num_tokens is None:
            num_tokens = config.num_token_look_close
            num_looks = config.num_look_close if num_tokens is None else None
        check_looks(num_looks, num_tokens, len(config.vision_config.ps3_scales) - 1, budget=self.select_num_each_scale)
        mode = self.look_close_mode or config.look_close_mode
        if mode not in LOOK_CLOSE_MODES:
            raise ValueError(f"look_close_mode must be one of {', '.join(LOOK_CLOSE_MODES)}")
        if mode == "after_prompt" and config.top_down_prompt_head_type is None:
            raise ValueError("this checkpoint cannot look after the prompt: use look_close_mode='after_image'")
        smooth = config.smooth_selection_prob if self.smooth_selection_prob is None else self.smooth_selection_prob
        budget = self.select_num_each_scale or config.vision_config.look_budget
        return LookOptions(num_looks, num_tokens, budget, mode, smooth)

    @property
    def is_look(self) -> bool:
        return self.num_look_close != 0 and self.num_token_look_close != 0


@dataclass
class Looked:
    """A batch after looking.

    features: of every prompt `(rows, H)`, those of all its pictures that are not in the cache yet.
    cached: positions of the batch that the cache holds.
    """

    batch: PaddedRows
    features: list[torch.Tensor]
    cached: int = 0
    selection_maps: list[torch.Tensor] | None = None
    selection_probs: list[torch.Tensor] | None = None
    raw_probs: list[torch.Tensor] | None = None
    top_down_prompt: torch.Tensor | None = None


class VilaHDLooking:
    """Looks at the pictures of prompts, for a model with a PS3 encoder, a projector and a language model."""

    config: VilaHDConfig
    vision_tower: Ps3VisionModel
    multi_modal_projector: VilaHDProjector
    language_model: nn.Module
    embed_text: Any
    _chunk_size: int

    def see(self, pixel_values: torch.Tensor) -> list[LowResView]:
        """Views of a few pictures at a time.

        Raises:
            ValueError: if the pictures are no squares of the largest scale.
        """
        side = self.config.vision_config.input_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values must be (pictures, 3, {side}, {side}): the encoder takes its largest scale"
            )
        return [self.vision_tower.see_low_res(some) for some in pixel_values.split(self._chunk_size)]

    def project_low_res(self, view: LowResView) -> torch.Tensor:
        """`(B, tokens, H)`."""
        return self.multi_modal_projector(view.hidden_states[self.config.vision_feature_layer])

    def look_closely(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor,
        options: LookOptions,
        cache: Cache | None = None,
        gt_selection_maps: torch.Tensor | None = None,
    ) -> Looked:
        """Looks at the pictures of a batch of prompts, and inserts placeholders for what it saw.

        Args:
            input_ids, attention_mask: `(batch, sequence)`.
            pixel_values: as of `get_image_features`.
            options: completed.
            cache: empty; it then holds the beginning of every prompt, which reading the question has computed.
            gt_selection_maps: `(pictures, height, width)`, above 0 where to look first.
        """
        rows = read_rows(input_ids, attention_mask, self.config, len(pixel_values))
        views = self.see(pixel_values)
        low = [features for view in views for features in self.project_low_res(view)]
        if not options.is_look:
            return Looked(pad_rows(rows, [0] * len(rows)), [join(row, low) for row in rows])
        prompts, prefixes, top_down = None, [0] * len(rows), None
        if options.look_close_mode == "after_prompt":
            top_down, prefixes = self._read_questions(rows, low, cache)
            of_row = [row for row in rows if row.picture_ends]
            counts = torch.tensor([len(row.picture_ends) for row in of_row], device=top_down.device)
            prompts = top_down.repeat_interleave(counts, 0)
        blocks, found = [], []
        for start in range(0, len(low), self._chunk_size):
            some = slice(start, start + self._chunk_size)
            wanted = None if gt_selection_maps is None else gt_selection_maps[some]
            # its large pictures are not needed any more
            view = views.pop(0)
            own, *chosen = self._look_at(view, None if prompts is None else prompts[some], options, wanted)
            blocks += own
            found.append(chosen)
        maps, probs, raw_probs = ([torch.cat(scale) for scale in zip(*part)] for part in zip(*found))
        rows = [row.with_inserted([len(blocks[picture]) for picture in row.pictures]) for row in rows]
        features = [torch.cat([low[i], blocks[i]]) for i in range(len(low))]
        batch, cached = pad_rows(rows, prefixes), max(prefixes)
        return Looked(batch, self._uncached(batch, rows, features, cached), cached, maps, probs, raw_probs, top_down)

    def _uncached(
        self, batch: PaddedRows, rows: list[PromptRow], features: list[torch.Tensor], cached: int
    ) -> list[torch.Tensor]:
        """Features of every row without those whose placeholders lie in the cache."""
        is_picture = (batch.input_ids == self.config.image_token_id) & batch.attention_mask.bool()
        counts = is_picture[:, :cached].sum(1).tolist()
        return [join(row, features)[count:] for row, count in zip(rows, counts)]

    def _read_questions(
        self, rows: list[PromptRow], low: list[torch.Tensor], cache: Cache | None
    ) -> tuple[torch.Tensor, list[int]]:
        """What each prompt with pictures makes the encoder look for, `(prompts, channels)`, and its cached prefix."""
        prefixes = [0] * len(rows)
        if cache is not None:
            longest = max(row.prefix for row in rows if row.picture_ends)
            prefixes = [min(row.prefix, longest) for row in rows]
        # the state is a question to the encoder, not a way to train the language model
        with torch.no_grad():
            asked = rows if cache is not None else [row for row in rows if row.picture_ends]
            embeds = []
            for row in asked:
                own = self.embed_text(row.ids[None])[0]
                is_picture = (row.ids == self.config.image_token_id).unsqueeze(-1)
                embeds.append(own.masked_scatter(is_picture, join(row, low).detach().to(own.dtype)))
            states = read_questions(self.language_model, embeds, asked, prefixes, cache)
        has_pictures = torch.tensor([bool(row.picture_ends) for row in asked], device=states.device)
        return self.multi_modal_projector.top_down_prompt_head(states[has_pictures]), prefixes

    def _look_at(
        self,
        view: LowResView,
        prompts: torch.Tensor | None,
        options: LookOptions,
        gt_selection_maps: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Features of each picture of a view, `(kept cells, H)`, maps, and chances as used and before smoothing."""
        tower, layer, grids = self.vision_tower, self.config.vision_feature_layer, view.pyramid.grids
        score = tower.score(view, prompts)
        raw = at_grids(score, grids)
        probs = at_grids(score, grids, gt_selection_maps, bool(options.smooth_selection_prob))
        plan = plan_looks(
            [rows * columns for rows, columns in grids],
            options.select_num_each_scale or [],
            options.num_look_close,
            options.num_token_look_close,
        )
        looks = list(choose_patches(probs, plan))
        num_blocks = self.config.vision_config.num_hidden_layers + 1 + layer
        tokens = [tower.look(view, chosen, num_blocks)[-1] for chosen in looks]
        ordered, maps = in_order(tokens, gather_order(looks, grids)), selection_maps(looks, probs)
        low, blocks = None, []
        for number, own in enumerate(ordered):
            kept, _ = self.multi_modal_projector.project_chosen(own, [scale[number] for scale in maps])
            if len(kept) == 0:
                # as trained: a close look is never empty
                low = self.project_low_res(view) if low is None else low
                kept = low[number, :1]
            blocks.append(kept)
        return blocks, maps, probs, raw


def reusable_cache(config: Any, given: Cache | None) -> Cache | None:
    """An empty cache that tokens can be taken out of again; None where the layers of this model cannot do that."""
    cache = DynamicCache(config=config) if given is None else given
    grow_in_place(cache)
    layers = getattr(cache, "layers", [])
    is_plain = type(cache) is DynamicCache and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in layers)
    return cache if is_plain and cache.get_seq_length() == 0 else None


def stack_embeds(embeds: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `(length, H)`, padded on a side -> `(batch, longest, H)` and their mask."""
    longest = max(len(own) for own in embeds)
    pads = [(longest - len(own), 0) if side == "left" else (0, longest - len(own)) for own in embeds]
    padded = torch.stack([F.pad(own, (0, 0, *pad)) for own, pad in zip(embeds, pads)])
    lengths = [torch.ones(len(own), dtype=torch.long, device=own.device) for own in embeds]
    return padded, torch.stack([F.pad(own, pad) for own, pad in zip(lengths, pads)])


def read_questions(
    language_model: Any, embeds: list[torch.Tensor], rows: list[PromptRow], prefixes: list[int], cache: Cache | None
) -> torch.Tensor:
    """The language model's state at the end of every row's first question, `(rows, H)`.

    Args:
        embeds: of every row `(length, H)`, pictures at low resolution.
        prefixes: how many tokens of each row stay in `cache` afterwards; without a cache they are ignored.
    """
    ends = [row.question_end + 1 for row in rows]
    if cache is None:
        padded, mask = stack_embeds([own[:end] for own, end in zip(embeds, ends)], "left")
        output = language_model(
            inputs_embeds=padded, attention_mask=mask, position_ids=count_positions(mask), use_cache=False
        )
        return output.last_hidden_state[:, -1]
    padded, mask = stack_embeds([own[:prefix] for own, prefix in zip(embeds, prefixes)], "left")
    states = language_model(
        inputs_embeds=padded, attention_mask=mask, position_ids=count_positions(mask), past_key_values=cache
    ).last_hidden_state[:, -1:]
    # a row without pictures only has to be in the cache
    spans = [slice(prefix, end if row.picture_ends else prefix) for row, prefix, end in zip(rows, prefixes, ends)]
    rest, rest_mask = stack_embeds([own[span] for own, span in zip(embeds, spans)], "right")
    if rest.shape[1]:
        full_mask = torch.cat([mask, rest_mask], 1)
        positions = count_positions(full_mask)[:, mask.shape[1] :]
        output = language_model(
            inputs_embeds=rest, attention_mask=full_mask, position_ids=positions, past_key_values=cache
        )
        states = torch.cat([states, output.last_hidden_state], 1)
        cache.crop(-rest.shape[1])
    last = torch.tensor([max(span.stop - span.start, 0) for span in spans], device=states.device)
    return states[torch.arange(len(rows), device=states.device), last]


def count_positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
