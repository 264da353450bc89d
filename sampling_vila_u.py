"""How VILA-U chooses a code from its logits, in transformers' filters.

Shape letters: N samples of all prompts, K codes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# of the release; a converted checkpoint has them in its generation_config.json
DRAWING_DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    "guidance_scale": 3.0,
    "temperature": 1.0,
    "top_k": 900,
    "top_p": 0.96,
}


@dataclass
class Sampling:
    """How a code is chosen: by chance from what `filters` leave or, without `do_sample`, the likeliest."""

    filters: LogitsProcessorList
    do_sample: bool = True
    generator: torch.Generator | None = None

    def choose(self, logits_NK: torch.Tensor) -> torch.Tensor:
        """`(N, codes) -> (N,)`."""
        if not self.do_sample:
            return logits_NK.argmax(-1)
        return torch.multinomial(self.probabilities(logits_NK), 1, generator=self.generator).squeeze(1)

    def probabilities(self, logits_NK: torch.Tensor) -> torch.Tensor:
        """`(N, codes)`, of what is drawn from; in float32."""
        none: Any = None  # ids that were drawn before, which these filters do not look at
        return self.filters(none, logits_NK.float()).nan_to_num(-math.inf, math.inf, -math.inf).softmax(-1)


def code_filters(
    codebook_size: int, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
) -> LogitsProcessorList:
    """transformers' filters in the order of the release: temperature, the likeliest k codes, those of a sum of p.

    Raises:
        ValueError: if one makes no sense, or `top_k` exceeds the codebook.
    """
    filters = LogitsProcessorList()
    if temperature is not None and temperature != 1:
        check_number("temperature", temperature, lambda value: value > 0, "a positive number")
        filters.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None and top_k != 0:
        is_count = isinstance(top_k, int) and not isinstance(top_k, bool)
        if not is_count or not 1 <= top_k <= codebook_size:
            raise ValueError(f"top_k must be 1 to {codebook_size}, the size of the codebook, got {top_k}")
        filters.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p != 1:
        check_number("top_p", top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        filters.append(TopPLogitsWarper(float(top_p)))
    return filters


def check_number(name: str, value: Any, is_good: Callable[[float], bool], wanted: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not is_good(value):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_count(name: str, value: Any, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value}")
    return value
