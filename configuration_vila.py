"""Configuration of the VILA understanding family (VILA-1.5, NVILA, LongVILA).

- A real `vision_config` and `text_config`, so that engines find the language model where they look for it.
- Every choice of the architecture is a named, typed option; none is read from a path, a size or a file name.
- Keys that this version does not know are kept as attributes and written back on save.
"""

import math
import re
from collections.abc import Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .context_vila import check_rope
from .geometry_vila import crops_per_side, num_tile_tokens, patches_per_side

if TYPE_CHECKING:  # what is given; once the config is made, a config object and a list
    SubConfig = Any
    Scales = Any
else:
    SubConfig = dict | PreTrainedConfig | None
    Scales = str | list[int] | tuple[int, ...] | None

# Space-to-channel factor of every projector type that merges patches, see `VilaMultiModalProjector`.
DOWNSAMPLE_FACTORS = {
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_3x3_s2": 3,
    "mlp_downsample_3x3_s2_new": 3,
}
PLAIN_PROJECTOR = re.compile(r"identity|linear|mlp([1-9]\d*)x_gelu")
CLASS_TOKEN_TOWERS = ("clip_vision_model", "internvl_vision")
# far beyond any model; what a damaged config asks for must not be built
MAX_LAYERS = 2**10
MAX_SIZE = 2**24
MAX_SCALE = 2**14  # pixels
MAX_TOKEN_ID = 2**31 - 1
ORIGINAL_CONFIG_KEYS = ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg")


def raise_value_errors(cls: Any) -> Any:
    """The error of a strict dataclass is no `ValueError`: makes its constructor raise one."""
    init = cls.__init__

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    cls.__init__ = __init__
    return cls


@raise_value_errors
@strict
class VilaConfig(PreTrainedConfig):
    r"""
    Args:
        vision_config: configuration of the vision tower, `siglip_vision_model` by default.
        text_config: configuration of the language model, `qwen2` by default.
        image_token_id: id that stands for one picture feature in `input_ids`. It may lie beyond the embedding table.
        video_token_id: the same for video features.
        projector_type: `"identity"`, `"linear"`, `"mlp2x_gelu"` (any depth), `"mlp_downsample"`,
            `"mlp_downsample_2x2_fix"`, `"mlp_downsample_3x3_fix"`, `"mlp_downsample_3x3_s2"` or
            `"mlp_downsample_3x3_s2_new"`.
        vision_feature_layer: hidden state of the tower that is used; 0 is the embedding output, -1 the last layer's
            output before any final norm. Layers behind it are not built.
        vision_feature_select_strategy: `"full"` keeps all tokens, `"default"` drops the first one (class token).
        s2: static S2: every picture at all `s2_scales`, maps resized to one scale and concatenated on channels.
        dynamic_s2: dynamic S2: the largest scale is a grid of tiles that fits the picture (NVILA §3.1).
        s2_scales: picture sizes in pixels, ascending. A comma-separated string is accepted.
        s2_max_split_size: largest crop in pixels that static S2 gives to the tower; the smallest scale by default.
        s2_resize_output_to_scale_idx: the scale whose map size the others are resized to.
        vision_chunk_size: tiles that go through the tower at a time; bounds the memory of encoding, not the result. By
            default 4 on a CPU, where more are not faster, and 8 elsewhere.
        video_pool_sizes: `[frames, rows, columns]` of every temporal-spatial pooling of a video's projected features
            (NVILA §3.2, the TSP encoder); None keeps all features of all frames (the basic encoder).
        time_token_ids: ids of the tokens that stand for times in a video, in order of time: soft targets of the
            training loss, see `soft_time_loss`. They must have rows in the embedding table.
        soft_ce_std: width of these soft targets, in ids.
        tie_word_embeddings: whether `lm_head` shares the weights of the input embeddings.
        original_options: options of an original checkpoint without a counterpart here; kept for the way back.

    Raises:
        ValueError: for an option of the wrong type or out of range; the message names it.
    """

    model_type = "vila"
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="siglip_vision_model", init_kwargs={"vision_use_head": False}
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    vision_config: SubConfig = None
    text_config: SubConfig = None
    image_token_id: int = 151649
    video_token_id: int = 151650
    projector_type: str = "mlp_downsample"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    s2: bool = False
    dynamic_s2: bool = False
    s2_scales: Scales = None
    s2_max_split_size: int | None = None
    s2_resize_output_to_scale_idx: int = 0
    vision_chunk_size: int | None = None
    video_pool_sizes: list[list[int]] | None = None
    time_token_ids: list[int] | None = None
    soft_ce_std: float = 1.0
    tie_word_embeddings: bool = False
    original_options: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if original := [key for key in ORIGINAL_CONFIG_KEYS if key in kwargs]:
            raise ValueError(
                f"this is the config of an original VILA checkpoint (it has {original[0]!r}): "
                "run `vila-convert SRC DST` on the folder first"
            )
        for part in ("vision_config", "text_config"):
            given = getattr(self, part)
            if isinstance(given, dict) and isinstance(layers := given.get("num_hidden_layers"), int):
                # before a sub-config makes a list of them
                require_positive(layers, f"{part}.num_hidden_layers", MAX_LAYERS)
        if isinstance(self.text_config, dict):
            check_rope(self.text_config)
        if self.s2_scales is not None:
            self.s2_scales = parse_scales(self.s2_scales)
        super().__post_init__(**kwargs)
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True

    @property
    def downsample_factor(self) -> int:
        """Patches per side that the projector merges into one token."""
        return DOWNSAMPLE_FACTORS.get(self.projector_type, 1)

    @property
    def num_vision_layers(self) -> int:
        """Tower layers that `vision_feature_layer` needs."""
        layer, total = self.vision_feature_layer, self.vision_config.num_hidden_layers
        return layer if layer >= 0 else total + 1 + layer

    @property
    def dynamic_scales(self) -> list[int] | None:
        """The scales if dynamic S2 cuts the pictures, else None: what the functions on tile grids take."""
        return self.s2_scales if self.dynamic_s2 else None

    @property
    def num_tile_tokens(self) -> int:
        """Feature rows of one tile (dynamic S2: of one block; static S2: of one picture) after the projector."""
        side = patches_per_side(first(self.vision_config.image_size), first(self.vision_config.patch_size))
        if self.s2:
            output_scale = self.s2_scales[self.s2_resize_output_to_scale_idx]
            side *= crops_per_side(output_scale, self.s2_max_split_size or self.s2_scales[0])
        return num_tile_tokens(side, self.downsample_factor, int(self._keeps_class_token))

    @property
    def _keeps_class_token(self) -> bool:
        has_class_token = self.vision_config.model_type in CLASS_TOKEN_TOWERS
        return has_class_token and self.vision_feature_select_strategy == "full"

    @property
    def feature_size(self) -> int:
        """Channels that enter the projector: tower channels times scales."""
        return self.vision_config.hidden_size * (len(self.s2_scales) if self.s2 or self.dynamic_s2 else 1)

    def validate_options(self) -> None:
        """In this order: what a later check computes with, an earlier one has seen."""
        self._check_sizes()
        self._check_feature_layer()
        self._check_scales()
        self._check_projector()
        self._check_pooling()
        self._check_time_tokens()
        check_rope(self.text_config)

    def _check_sizes(self) -> None:
        for part in ("vision_config", "text_config"):
            require_positive(getattr(getattr(self, part), "hidden_size", None), f"{part}.hidden_size")
            layers = getattr(getattr(self, part), "num_hidden_layers", None)
            require_positive(layers, f"{part}.num_hidden_layers", MAX_LAYERS)
            for name in ("num_attention_heads", "intermediate_size"):
                require_positive(getattr(getattr(self, part), name, 1), f"{part}.{name}")
        require_positive(getattr(self.text_config, "vocab_size", None), "text_config.vocab_size")
        for name in ("image_size", "patch_size"):
            size = getattr(self.vision_config, name, None)
            sides = list(size) if isinstance(size, (list, tuple)) else [size]
            require_positive(sides[0] if sides else None, f"vision_config.{name}")
            if len(set(sides)) > 1:
                raise ValueError(f"vision_config.{name} must be a square, got {size}")
        if first(self.vision_config.patch_size) > first(self.vision_config.image_size):
            raise ValueError(
                f"vision_config.image_size {self.vision_config.image_size} holds no patch of "
                f"{self.vision_config.patch_size} pixels"
            )
        if self.vision_chunk_size is not None:
            require_positive(self.vision_chunk_size, "vision_chunk_size")
        ids = (self.image_token_id, self.video_token_id)
        if min(ids) < 0 or max(ids) > MAX_TOKEN_ID or ids[0] == ids[1]:
            raise ValueError(
                f"token ids must be different, not negative and below 2**31: image_token_id={self.image_token_id}, "
                f"video_token_id={self.video_token_id}"
            )

    def _check_feature_layer(self) -> None:
        if not 0 <= self.num_vision_layers <= self.vision_config.num_hidden_layers:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer} is outside of the tower's "
                f"{self.vision_config.num_hidden_layers} layers"
            )

    def _check_scales(self) -> None:
        if self.s2 and self.dynamic_s2:
            raise ValueError("s2 and dynamic_s2 exclude each other")
        if self.s2_max_split_size is not None:
            require_positive(self.s2_max_split_size, "s2_max_split_size")
        if not (self.s2 or self.dynamic_s2):
            return
        if not self.s2_scales:
            raise ValueError("s2 and dynamic_s2 need s2_scales")
        if not -len(self.s2_scales) <= self.s2_resize_output_to_scale_idx < len(self.s2_scales):
            raise ValueError(
                f"s2_resize_output_to_scale_idx={self.s2_resize_output_to_scale_idx} is outside of the "
                f"{len(self.s2_scales)} scales"
            )
        side = first(self.vision_config.image_size)
        for scale in self.s2_scales if self.s2 else self.s2_scales[:1]:
            crops = crops_per_side(scale, self.s2_max_split_size or self.s2_scales[0]) if self.s2 else 1
            if crops * side != scale:
                raise ValueError(
                    f"s2_scales: {scale} pixels are not {crops} crops of the tower's image_size {side} per side"
                )

    def _check_projector(self) -> None:
        if self.projector_type not in DOWNSAMPLE_FACTORS and not PLAIN_PROJECTOR.fullmatch(self.projector_type):
            raise ValueError(
                f"unknown projector_type {self.projector_type!r}; known are identity, linear, mlp<N>x_gelu, "
                + ", ".join(DOWNSAMPLE_FACTORS)
            )
        has_class_token = self.vision_config.model_type in CLASS_TOKEN_TOWERS
        if not has_class_token and self.vision_feature_select_strategy == "default" and self.downsample_factor > 1:
            raise ValueError(
                f"projector_type {self.projector_type!r} merges patches of a square map: the tower has no class token "
                "to drop, use vision_feature_select_strategy='full'"
            )
        if self.downsample_factor > 1 and self._keeps_class_token:
            raise ValueError(
                f"projector_type {self.projector_type!r} merges patches of a square map: drop the tower's class token "
                "with vision_feature_select_strategy='default'"
            )

    def _check_pooling(self) -> None:
        if self.video_pool_sizes is None:
            return
        if not self.video_pool_sizes:
            raise ValueError("video_pool_sizes must not be empty; None stands for no pooling")
        for pool in self.video_pool_sizes:
            if len(pool) != 3:
                raise ValueError(f"video_pool_sizes must hold triples of frames, rows and columns, got {pool}")
            for size in pool:
                require_positive(size, "video_pool_sizes")

    def _check_time_tokens(self) -> None:
        ids, rows = self.time_token_ids or [], self.text_config.vocab_size
        if len(set(ids)) != len(ids) or any(not 0 <= token < rows for token in ids):
            raise ValueError(f"time_token_ids must be different ids below text_config.vocab_size {rows}, got {ids}")
        if not 0 < self.soft_ce_std < math.inf:
            raise ValueError(f"soft_ce_std must be a positive number, got {self.soft_ce_std}")


def first(size: int | Sequence[int]) -> int:
    """Height of a size that some towers give as one number and others as `(height, width)`."""
    return size if isinstance(size, int) else size[0]


def parse_scales(scales: str | Sequence[int]) -> list[int]:
    """`"448,896,1344"` or a sequence -> ascending list of pixels."""
    values = scales.split(",") if isinstance(scales, str) else scales
    try:
        numbers = [int(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"s2_scales must be whole numbers, got {scales!r}") from error
    if not numbers or min(numbers) < 1 or max(numbers) > MAX_SCALE or len(set(numbers)) != len(numbers):
        raise ValueError(f"s2_scales must be different positive numbers up to {MAX_SCALE}, got {scales!r}")
    return sorted(numbers)


def require_positive(value: Any, name: str, most: int = MAX_SIZE) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a positive whole number up to {most}, got {value!r}")


__all__ = ["VilaConfig"]
