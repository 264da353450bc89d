"""Configuration of PS3, an encoder that looks closely only at chosen patches of a picture of up to 4K.

- The trunk is described by numbers; none is looked up by a name.
- `vision_config` alone makes an encoder; with `text_config` a text can choose the patches.
"""

from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_vila import MAX_LAYERS, MAX_SCALE, MAX_SIZE, raise_value_errors, require_positive

if TYPE_CHECKING:  # what is given; once the config is made, a config object and a list
    SubConfig = Any
    Numbers = Any
else:
    SubConfig = dict | PreTrainedConfig | None
    Numbers = list[int] | tuple[int, ...] | None


@raise_value_errors
@strict
class Ps3VisionConfig(PreTrainedConfig):
    r"""
    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the ViT trunk.
        patch_size: pixels per side.
        layer_norm_eps: of the trunk's norms.
        position_grid: side of the trunk's table of positions, in patches.
        position_mode: how another grid gets its positions: `"interpolate"` resizes the table, `"crop"` takes its
            top left corner (C-RADIO).
        ps3_scales: pixels per side of every scale, ascending; the first is the whole picture at low resolution, of
            the others patches are chosen. Each is a multiple of the first and of the patch size.
        select_based_on_layer: blocks whose outputs the choice of patches is based on.
        max_select_num: patches of one look.
        max_select_num_each_scale: patches of one look at each high-resolution scale; by default `max_select_num` in
            proportion to the areas.
        separate_pos_emb: whether every high-resolution scale has positions of its own beside the trunk's.
        highres_selection_feature: whether a shallow convolutional net helps to choose.
        highres_selection_module_hidden_dim, _out_dim, _depth, _kernel_size: of that net.
        final_norm: whether the trunk has a norm in front of the pooling; token features never go through it.
        pooling_size: width of the attention pooling; 0 builds none.
        adapter_size, adapter_blocks: hidden width and residual blocks of the MLP in front of the pooling (C-RADIO);
            a width of 0 builds none.

    Raises:
        ValueError: for an option of the wrong type or out of range; the message names it.
    """

    model_type = "ps3_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    position_grid: int = 27
    position_mode: Literal["interpolate", "crop"] = "interpolate"
    ps3_scales: Numbers = None
    select_based_on_layer: Numbers = None
    max_select_num: int = 1280
    max_select_num_each_scale: Numbers = None
    separate_pos_emb: bool = True
    highres_selection_feature: bool = True
    highres_selection_module_hidden_dim: int = 512
    highres_selection_module_out_dim: int = 512
    highres_selection_module_depth: int = 3
    highres_selection_module_kernel_size: int = 28
    final_norm: bool = True
    pooling_size: int = 1152
    adapter_size: int = 0
    adapter_blocks: int = 0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_original(kwargs)
        self.ps3_scales = whole_numbers(self.ps3_scales or (378, 756, 1512), "ps3_scales")
        layers = (0, 9, 18, 26) if self.select_based_on_layer is None else self.select_based_on_layer
        self.select_based_on_layer = whole_numbers(layers, "select_based_on_layer")
        if self.max_select_num_each_scale is not None:
            self.max_select_num_each_scale = whole_numbers(self.max_select_num_each_scale, "max_select_num_each_scale")
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Pixels per side of the low-resolution view, the part of the sequence that is always there."""
        return self.ps3_scales[0]

    @property
    def input_size(self) -> int:
        """Pixels per side of the pictures that the encoder takes: the largest scale."""
        return self.ps3_scales[-1]

    @property
    def look_budget(self) -> list[int]:
        """Patches of one look at each high-resolution scale (PS3 §3.3); rounding is the last scale's."""
        if self.max_select_num_each_scale is not None:
            return list(self.max_select_num_each_scale)
        areas = [scale**2 for scale in self.ps3_scales[1:]]
        budget = [int(self.max_select_num * area / sum(areas)) for area in areas]
        budget[-1] += self.max_select_num - sum(budget)
        return budget

    def validate_options(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "patch_size",
            "position_grid",
            "max_select_num",
            "highres_selection_module_hidden_dim",
            "highres_selection_module_out_dim",
            "highres_selection_module_kernel_size",
        ):
            require_positive(getattr(self, name), name)
        require_positive(self.num_hidden_layers, "num_hidden_layers", MAX_LAYERS)
        for name, most in (
            ("highres_selection_module_depth", MAX_LAYERS),
            ("adapter_blocks", MAX_LAYERS),
            ("pooling_size", MAX_SIZE),
            ("adapter_size", MAX_SIZE),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be a whole number of 0 to {most}")
        for name, width in (("hidden_size", self.hidden_size), ("pooling_size", self.pooling_size)):
            if width % self.num_attention_heads:
                raise ValueError(f"{name} {width} does not divide into {self.num_attention_heads} heads")
        self._check_scales()
        if any(not 0 <= layer < self.num_hidden_layers for layer in self.select_based_on_layer):
            raise ValueError(f"select_based_on_layer must name blocks of 0 to {self.num_hidden_layers - 1}")

    def _check_scales(self) -> None:
        scales = self.ps3_scales
        if len(scales) < 2 or sorted(set(scales)) != scales or not 1 <= scales[0] <= scales[-1] <= MAX_SCALE:
            raise ValueError(
                f"ps3_scales must be at least two ascending sizes of up to {MAX_SCALE} pixels, got {scales}"
            )
        for scale in scales:
            if scale % self.patch_size or scale % scales[0]:
                raise ValueError(
                    f"ps3_scales: {scale} is no multiple of the patch size {self.patch_size} and of the first scale "
                    f"{scales[0]}"
                )
        if self.position_mode == "crop" and scales[-1] // self.patch_size > self.position_grid:
            raise ValueError(
                f"position_grid {self.position_grid} is smaller than the {scales[-1] // self.patch_size} patches of "
                "the largest scale"
            )
        if self.max_select_num_each_scale is not None:
            check_budget(self.max_select_num_each_scale, len(scales) - 1, "max_select_num_each_scale")


@raise_value_errors
@strict
class Ps3TextConfig(PreTrainedConfig):
    r"""
    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the transformer.
        vocab_size, context_length: ids, and positions of a text.
        layer_norm_eps: of all norms but that of the prompt's projection.
        hidden_act_approximate: `"none"` or `"tanh"`, as `torch.nn.GELU` names it.
        is_causal: whether a position sees only those before it.
        pool_type: position that stands for the text: `"last"`, `"first"` or `"argmax"`, the one of the largest id.
        projection_bias: whether the projection is a linear layer with a bias or a bare matrix.
        projection_size, prompt_size: width of the text's embedding, and of the prompt made from it.
    """

    model_type = "ps3_text_model"
    base_config_key = "text_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    vocab_size: int = 32000
    context_length: int = 64
    layer_norm_eps: float = 1e-6
    hidden_act_approximate: Literal["none", "tanh"] = "none"
    is_causal: bool = False
    pool_type: Literal["last", "first", "argmax"] = "last"
    projection_bias: bool = True
    projection_size: int = 1152
    prompt_size: int = 1152
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_original(kwargs)
        super().__post_init__(**kwargs)

    def validate_options(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
            "context_length",
            "projection_size",
            "prompt_size",
        ):
            require_positive(getattr(self, name), name)
        require_positive(self.num_hidden_layers, "num_hidden_layers", MAX_LAYERS)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")


@raise_value_errors
@strict
class Ps3Config(PreTrainedConfig):
    r"""
    Args:
        vision_config: a `Ps3VisionConfig`.
        text_config: a `Ps3TextConfig`; None for an encoder without the text tower.
    """

    model_type = "ps3"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=Ps3VisionConfig)}

    vision_config: SubConfig = None
    text_config: SubConfig = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = Ps3TextConfig(**self.text_config)
        super().__post_init__(**kwargs)


def refuse_original(options: dict[str, Any]) -> None:
    for key in ("model_name", "hf_tokenizer_name"):
        if key in options:
            raise ValueError(
                f"this is the config of an original PS3 checkpoint (it has {key!r}): run `vila-convert SRC DST` on "
                "the folder first"
            )


def whole_numbers(values: Any, name: str) -> list[int]:
    if not isinstance(values, (list, tuple)) or any(type(value) is not int for value in values):
        raise ValueError(f"{name} must be a list of whole numbers, got {values!r}")
    return list(values)


def check_budget(budget: Any, num_scales: int, name: str) -> list[int]:
    """Patches per look and scale.

    Raises:
        ValueError: if they are not one number for each high-resolution scale, at least one of them above 0.
    """
    budget = whole_numbers(budget, name)
    if len(budget) != num_scales or min(budget) < 0 or sum(budget) < 1:
        raise ValueError(f"{name} must be {num_scales} numbers of patches, not all of them 0, got {budget}")
    return budget


__all__ = ["Ps3Config", "Ps3TextConfig", "Ps3VisionConfig"]
