"""What `generate()` adds for VILA-HD: it looks first, and the caller sees the own prompt in front of the answer."""

from dataclasses import fields
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .generation_vila import VilaGenerationMixin
from .looking_vila_hd import Looked, LookOptions, reusable_cache

# attribute of a cache: the options of what it holds
LOOKED_WITH = "vila_look_options"


class VilaHDGenerationMixin(VilaGenerationMixin):
    """For a model whose base model is a `VilaHDModel`."""

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`VilaForConditionalGeneration.generate` with the arguments of `LookOptions`.

        What they leave open is the choice of the `generation_config` that is given, then of the model's, then of the
        checkpoint. A chat is continued with the look options that it was begun with: its cache holds what they showed.

        Args:
            output_selection_maps: return an output that holds, besides `sequences`, the lists `selection_maps` and
                `selection_probs`, for each high-resolution scale `(pictures, h, w)`; None where nothing was looked at.

        Raises:
            ValueError: as `forward`, if the prompt with what was looked at is longer than the model's context, or if a
                chat is continued with other look options.
        """
        cache = kwargs.get("past_key_values")
        options = self._look_options(args, kwargs, cache)
        with_maps = kwargs.pop("output_selection_maps", False)
        if with_maps:
            kwargs["return_dict_in_generate"] = True
        input_ids = kwargs.pop("input_ids", inputs)
        if kwargs.get("pixel_values") is None or input_ids is None:
            output = super().generate(input_ids, *args, **kwargs)
            return with_selection_maps(output, None) if with_maps else output
        with torch.no_grad():
            looked = self._look_before_generating(input_ids, options, args, kwargs)
        output = super().generate(looked.batch.input_ids, *args, **kwargs)
        for own in (cache, getattr(output, "past_key_values", None)):
            if own is not None:
                setattr(own, LOOKED_WITH, options)
        # callers cut their own prompt off: what was inserted is not theirs
        is_output = isinstance(output, ModelOutput)
        sequences = output.sequences if is_output else output
        prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0)
        new_ids = sequences[:, looked.batch.input_ids.shape[1] :]
        sequences = torch.cat([prompts.to(new_ids.device), new_ids], 1)
        if not is_output:
            return sequences
        output["sequences"] = sequences
        return with_selection_maps(output, looked) if with_maps else output

    def _look_options(self, args: tuple, kwargs: dict[str, Any], cache: Any) -> LookOptions:
        """Completed; they are taken out of the arguments."""
        given = LookOptions(**{own.name: kwargs.pop(own.name, None) for own in fields(LookOptions)})
        begun = getattr(cache, LOOKED_WITH, None) if cache is not None and cache.get_seq_length() else None
        if begun is not None and given == LookOptions():
            return begun
        for source in (args[0] if args else kwargs.get("generation_config"), self.generation_config):
            given = given.or_else(LookOptions.of(source))
        options = given.completed(self.config)
        if begun is not None and begun != options:
            raise ValueError(f"the chat in past_key_values was begun with {begun}: it cannot go on with {options}")
        return options

    def _look_before_generating(
        self, input_ids: torch.Tensor, options: LookOptions, args: tuple, kwargs: dict[str, Any]
    ) -> Looked:
        """Looks, and puts what was seen and the cache of the prompt's beginning into the arguments of `generate`."""
        given, cache = kwargs.get("past_key_values"), None
        if given is not None and given.get_seq_length() and len(input_ids) > 1:
            raise ValueError("a batch of chats with pictures cannot be continued: pass them one by one")
        if self._can_reuse_prefix(args, kwargs):
            cache = reusable_cache(self.config.text_config, given)
        kwargs.pop("image_grid_thw", None)
        pixel_values = kwargs.pop("pixel_values").to(self.model.vision_tower.device)
        mask = kwargs.get("attention_mask")
        looked = self.model.look_closely(input_ids, mask, pixel_values, options, cache)
        features = looked.features
        if given is not None and given.get_seq_length() > looked.cached:
            # an earlier turn: its pictures were looked at with the same question, and are in the cache as they are
            known = looked.batch.input_ids[0, : given.get_seq_length()] == self.config.image_token_id
            features = [features[0][int(known.sum()) :]]
        if cache is not None and looked.cached:
            kwargs["past_key_values"] = cache
        kwargs["attention_mask"] = looked.batch.attention_mask
        if any(len(own) for own in features):
            kwargs["mm_encoder_outputs"] = as_encoded(features)
        return looked

    def _can_reuse_prefix(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the prompt's beginning may come from a cache.

        Not for beams, whose rows are repeated later; not for assisted generation, which wants to fill the cache from
        its beginning; and not where another kind of cache, or none, is asked for.
        """
        config = args[0] if args else kwargs.get("generation_config")

        def option(name: str) -> Any:
            for source in (kwargs.get(name), getattr(config, name, None), getattr(self.generation_config, name, None)):
                if source is not None:
                    return source
            return None

        is_assisted = kwargs.get("assistant_model") is not None or option("prompt_lookup_num_tokens") is not None
        is_single = (option("num_beams") or 1) == 1 and (option("num_return_sequences") or 1) == 1
        has_own_cache = option("cache_implementation") is not None or option("use_cache") is False
        return is_single and not has_own_cache and not is_assisted


def as_encoded(features: list[torch.Tensor]) -> dict[str, BaseModelOutputWithPooling]:
    return {"image": BaseModelOutputWithPooling(pooler_output=features)}  # type: ignore[arg-type]


def with_selection_maps(output: Any, looked: Looked | None) -> Any:
    output["selection_maps"] = None if looked is None else looked.selection_maps
    output["selection_probs"] = None if looked is None else looked.selection_probs
    return output
