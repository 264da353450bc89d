"""How many tokens a language model takes: what its config says, and what its rotary embedding reaches."""

import math
from collections.abc import Mapping
from typing import Any

# their factor stretches the positions that the model was trained with; others say what the stretched model takes
STRETCHING = ("linear", "dynamic", "yarn")


def context_length(text_config: Any) -> float:
    """Tokens that a language model was made for; infinite where its config does not say.

    `max_position_embeddings`, or what a rope scaling makes of it that stretches by a factor.
    """
    length = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if length is None:
        return math.inf
    if rope.get("rope_type") not in STRETCHING:
        return length
    original = rope.get("original_max_position_embeddings") or length
    return max(length, math.floor(original * rope["factor"])) if is_number(rope.get("factor")) else math.inf


def check_rope(text_config: Any) -> None:
    """Refuses rotary settings that contradict the context; of a config, or of the dictionary that becomes one.

    Raises:
        ValueError: naming the setting.
    """
    options = text_config if isinstance(text_config, Mapping) else vars(text_config)
    length = options.get("max_position_embeddings")
    rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError("text_config.rope_parameters must be a dictionary")
    if any(isinstance(value, Mapping) for value in rope.values()):
        return  # one for each kind of layer
    for name, value in (("rope_theta", options.get("rope_theta")), *rope.items()):
        if name in ("rope_theta", "factor", "original_max_position_embeddings") and value is not None:
            least = 1 if name != "rope_theta" else 0
            if not is_number(value) or not (value >= least and value > 0):
                raise ValueError(
                    f"text_config.rope_parameters: {name} must be a number of at least {least}, and above 0"
                )
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if kind == "default" and factor not in (None, 1):
        raise ValueError(
            f"text_config.rope_parameters: factor={factor} has no effect without a rope_type, as 'yarn' or 'linear'"
        )
    if kind in STRETCHING and factor is None:
        raise ValueError(f"text_config.rope_parameters: rope_type {kind!r} needs a factor")
    if not is_number(length) or original is None:
        return
    if original > length:
        raise ValueError(
            f"text_config.rope_parameters: original_max_position_embeddings={original} is more than "
            f"max_position_embeddings={length}, which it is stretched to"
        )
    if kind in STRETCHING and length > original * factor:
        raise ValueError(
            f"text_config.max_position_embeddings={length} is more than the {math.floor(original * factor)} tokens "
            f"that rope_parameters reach: {original} stretched {factor} times"
        )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
