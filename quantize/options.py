"""How a checkpoint is quantised."""

from dataclasses import dataclass
from typing import Any

from ..quantization_vila import HEAD_BITS

METHODS = ("awq", "gptq", "rtn")
BITS = (3, 4)
DTYPES = ("bfloat16", "float16", "float32")
OPTIONS = {"method": METHODS, "bits": BITS, "head_bits": HEAD_BITS, "dtype": DTYPES}
# what is left as it is, in our tree and in the names of the files: engines compare prefixes or search for substrings
SKIPPED = (
    "model.vision_tower",
    "vision_tower",
    "model.multi_modal_projector",
    "mm_projector",
    "lm_head",
    "model.depth_transformer",
)


@dataclass(frozen=True)
class Options:
    """How a checkpoint is quantised.

    Attributes:
        method: `"awq"` searches scales and clips on calibration data, `"gptq"` makes up for errors while it rounds,
            `"rtn"` rounds to nearest.
        bits: of a weight; 3 is for comparisons and stored in 4.
        group_size: inputs that share a scale.
        head_bits: 8 rounds the output head as well.
        samples, max_tokens: conversations of the calibration, and tokens that are used of each.
        media_share: share of them with pictures or videos.
        duo: whether scales also grow where weights are small.
        clips: whether weights are clipped.
        dtype: of what is not quantised; the int4 kernels are fast with bfloat16 alone.
    """

    method: str = "awq"
    bits: int = 4
    group_size: int = 128
    head_bits: int = 16
    samples: int = 128
    max_tokens: int = 512
    media_share: float = 0.75
    duo: bool = True
    clips: bool = True
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, allowed in OPTIONS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.samples < 1 or self.max_tokens < 1 or not 0 <= self.media_share <= 1:
            raise ValueError("samples and max_tokens must be at least 1, media_share between 0 and 1")

    def config(self) -> dict[str, Any]:
        """`quantization_config` of `config.json`."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(SKIPPED),
            "head_bits": self.head_bits,
        }
