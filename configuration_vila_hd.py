"""Configuration of VILA-HD: VILA with a PS3 encoder that looks closely where the question leads it."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_ps3 import Ps3VisionConfig
from .configuration_vila import VilaConfig, raise_value_errors

LOOK_CLOSE_MODES = ("after_prompt", "after_image")


@raise_value_errors
@strict
class VilaHDConfig(VilaConfig):
    r"""
    Args:
        vision_config: a `Ps3VisionConfig`.
        look_close_mode: `"after_prompt"` reads the question before it chooses patches (top-down), `"after_image"`
            chooses by the picture alone (bottom-up).
        num_look_close: looks at every picture unless a call says otherwise; 0 is the low-resolution view alone.
        num_token_look_close: patches that are looked at instead, if it is not None.
        smooth_selection_prob: choose patches by averages over blocks of the picture.
        top_down_prompt_head_type: `"linear"` or `"mlp"`, what makes the encoder's prompt from the language model's
            state; None where a checkpoint has no such head and cannot choose after the prompt.
        high_res_pos_embed: whether projected features get positions and a mark of their scale.
        user_end_ids: ids between the end of the user's text and the answer; the state in front of them, of the first
            turn, is what the prompt is made of.
        token_selection_loss_weight: weight of the selection loss in the training loss.
        select_gt_in_training: look first where `gt_selection_maps` says, in training.

    Raises:
        ValueError: for an option of the wrong type or out of range; the message names it.
    """

    model_type = "vila_hd"
    keys_to_ignore_at_inference = [
        *VilaConfig.keys_to_ignore_at_inference,
        "selection_loss",
        "selection_maps",
        "selection_probs",
        "top_down_prompt",
    ]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=Ps3VisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    look_close_mode: Literal["after_prompt", "after_image"] = "after_prompt"
    num_look_close: int = 1
    num_token_look_close: int | None = None
    smooth_selection_prob: bool = False
    top_down_prompt_head_type: Literal["linear", "mlp"] | None = "mlp"
    high_res_pos_embed: bool = False
    user_end_ids: list[int] | None = None
    token_selection_loss_weight: float = 0.0
    select_gt_in_training: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if getattr(self.vision_config, "model_type", None) != Ps3VisionConfig.model_type:
            raise ValueError("vision_config must be that of a PS3 encoder")

    def validate_options(self) -> None:
        super().validate_options()
        for name in ("num_look_close", "num_token_look_close"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be a whole number of at least 0")
        if self.look_close_mode == "after_prompt" and self.top_down_prompt_head_type is None:
            raise ValueError("look_close_mode 'after_prompt' needs a top_down_prompt_head_type")
        if self.vision_feature_layer not in (-1, -2):
            raise ValueError("vision_feature_layer must be -1 or -2, one of the encoder's last two blocks")
        if self.s2 or self.dynamic_s2 or self.vision_feature_select_strategy != "full":
            raise ValueError("s2, dynamic_s2 and a class token do not go with a PS3 encoder")


__all__ = ["VilaHDConfig"]
