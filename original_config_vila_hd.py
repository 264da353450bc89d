"""Configurations of original PS3 and VILA-HD folders -> this package's, and those of VILA-HD back."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from .chat_templates_vila import user_end_ids
from .configuration_ps3 import Ps3Config, Ps3VisionConfig, whole_numbers
from .configuration_vila import MAX_SIZE
from .configuration_vila_hd import VilaHDConfig
from .image_processing_ps3 import Ps3ImageProcessor
from .image_processing_vila import VilaImageProcessor
from .original_config_vila import (
    ENCODER_TARGET,
    LANGUAGE_MODEL_CLASSES,
    NOISE,
    SUB_CONFIG_NOISE,
    TRANSLATED,
    check_image_processor,
    original_text_config,
    square,
    to_original_encoders,
    to_original_projector,
    to_processor_options,
    without,
)
from .processing_vila import VilaProcessor
from .processing_vila_hd import VilaHDProcessor

# what an original config says by a name alone: width of a patch and of the table of positions in pixels, blocks,
# heads, and the ratio of the hidden width
TRUNKS = {
    "vit_so400m_patch14_siglip_384": (14, 384, 27, 16, 3.7362),
    "vit_so400m_patch14_siglip_378": (14, 378, 27, 16, 3.7362),
    "vit_large_patch16_224": (16, 224, 24, 16, 4.0),
}
# options that mean the same there
KEPT = (
    "hidden_size",
    "ps3_scales",
    "select_based_on_layer",
    "max_select_num",
    "max_select_num_each_scale",
    "separate_pos_emb",
    "highres_selection_feature",
    "highres_selection_module_hidden_dim",
    "highres_selection_module_out_dim",
    "highres_selection_module_depth",
    "highres_selection_module_kernel_size",
)
RADIO_POOLING_SIZE = 1152
# of every released C-RADIO encoder; an encoder in a VILA-HD does without, and does not remember it
RADIO_ADAPTER = {
    "radio_adapter_mlp_version": "v2",
    "radio_adapter_mlp_hidden_dim": 1520,
    "radio_adapter_mlp_output_dim": RADIO_POOLING_SIZE,
    "radio_adapter_mlp_num_inner": 3,
}
HD_TRANSLATED = {
    "ps3",
    "look_close_mode",
    "num_look_close",
    "num_token_look_close",
    "smooth_selection_prob",
    "top_down_prompt_head_type",
    "high_res_pos_embed",
    "mm_low_res_token_num",
    "mm_scale_num",
    "token_selection_loss_weight",
}


def to_ps3_vision_config(tower: dict[str, Any], weights: dict[str, list[int]]) -> dict[str, Any]:
    """An original vision config.

    Args:
        weights: names and shapes of the checkpoint's weights, which say whether the pooling is among them.

    Raises:
        ValueError: for a trunk that is not known, or an adapter that is not supported.
    """
    named, name = part_of(tower, "trunk_args"), tower.get("model_name")
    if not named and name not in TRUNKS:
        raise ValueError(f"vision config: model_name {name!r} is none of {', '.join(TRUNKS)}")
    patch, side, depth, heads, ratio = TRUNKS.get(str(name), (14, 0, 0, 0, 0.0))
    width = number(tower, "hidden_size", 1152)
    patch, ratio = number(named, "patch_size", patch), number(named, "mlp_ratio", ratio, float)
    is_radio = bool(tower.get("radio"))
    has_pooling = any(weight.endswith("trunk.attn_pool.latent") for weight in weights)
    adapter = bool(is_radio and has_pooling)
    if adapter and tower.get("radio_adapter_mlp_version") != "v2":
        raise ValueError("vision config: radio_adapter_mlp_version must be 'v2'")
    scales = sorted(whole_numbers(tower.get("ps3_scales") or [378, 756, 1512], "ps3_scales"))
    return {
        **{key: tower[key] for key in KEPT if tower.get(key) is not None},
        "ps3_scales": scales,
        "intermediate_size": int(width * ratio),
        "num_hidden_layers": named.get("depth", depth),
        "num_attention_heads": named.get("num_heads", heads),
        "patch_size": patch,
        "position_grid": number(tower, "img_size", side or scales[0]) // patch,
        "position_mode": "crop" if is_radio else "interpolate",
        "final_norm": not is_radio or bool(tower.get("final_norm")),
        "pooling_size": (RADIO_POOLING_SIZE if is_radio else width) if has_pooling else 0,
        "adapter_size": tower.get("radio_adapter_mlp_hidden_dim") or 0 if adapter else 0,
        "adapter_blocks": tower.get("radio_adapter_mlp_num_inner") or 0 if adapter else 0,
        "model_type": "ps3_vision_model",
    }


def to_ps3_text_config(text: dict[str, Any]) -> dict[str, Any]:
    """An original text config.

    Raises:
        ValueError: for an option that no released checkpoint has.
    """
    for key in ("ls_init_value", "embed_cls", "final_ln_after_pool"):
        if text.get(key):
            raise ValueError(f"text config: {key} is not supported")
    width = number(text, "width", 512)
    return {
        "hidden_size": width,
        "intermediate_size": int(width * number(text, "mlp_ratio", 4.0, float)),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "vocab_size": text.get("vocab_size", 49408),
        "context_length": text.get("context_length", 77),
        "layer_norm_eps": part_of(text, "norm_kwargs").get("eps", 1e-5),
        "hidden_act_approximate": part_of(text, "act_kwargs").get("approximate", "none"),
        "is_causal": not text.get("no_causal_mask", False),
        "pool_type": text.get("pool_type", "argmax"),
        "projection_bias": text.get("proj_bias", False),
        "projection_size": text.get("output_dim", 1152),
        "prompt_size": text.get("prompt_proj_dim", 1152),
    }


def to_ps3_config(root: dict[str, Any], weights: dict[str, list[int]]) -> Ps3Config:
    """The config of a PS3 folder, of the whole model or of the vision model alone."""
    vision = part_of(root, "vision_config") if "vision_config" in root else root
    text = part_of(root, "text_config")
    has_text = any(name.startswith("text_model.") for name in weights)
    return Ps3Config(
        vision_config=to_ps3_vision_config(vision, weights),
        text_config=to_ps3_text_config(text) if text and has_text else None,
    )


def to_vila_hd_config(
    root: dict[str, Any],
    llm: dict[str, Any],
    tower: dict[str, Any],
    projector: dict[str, Any],
    weights: dict[str, list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> VilaHDConfig:
    """Configs of the root and of the three folders -> `VilaHDConfig`.

    Args:
        weights: names and shapes of the projector's weights; they say which head and positions the checkpoint has.
        tokenizer: with the media tokens and the chat template.

    Raises:
        ValueError: for a language model that is not supported, or an option that makes no sense.
    """
    if llm.get("model_type") not in LANGUAGE_MODEL_CLASSES:
        raise ValueError(f"llm/config.json: model_type {llm.get('model_type')!r} is not supported")
    if tower.get("model_type") != "ps3_vision_model":
        raise ValueError(f"vision_tower/config.json: model_type {tower.get('model_type')!r} is no PS3 encoder")
    if "mm_projector_type" not in projector:
        raise ValueError("mm_projector/config.json: mm_projector_type is missing")
    if (root.get("mm_vision_select_feature") or "cls_patch") != "cls_patch":
        raise ValueError("config.json: mm_vision_select_feature must be 'cls_patch', PS3 has no class token")
    # the original keeps the last two outputs, which 0 and 1 name as well
    layers = {0: -2, 1: -1}
    layer: Any = -2 if root.get("mm_vision_select_layer") is None else root["mm_vision_select_layer"]
    heads: dict[str, Any] = {"top_down_prompt_head.weight": "linear", "top_down_prompt_head.fc1.weight": "mlp"}
    head = next((kind for name, kind in heads.items() if name in weights), None)
    noise = NOISE | TRANSLATED | HD_TRANSLATED
    return VilaHDConfig(
        text_config=without(llm, SUB_CONFIG_NOISE),
        vision_config=to_ps3_vision_config(tower, {}),
        projector_type=projector["mm_projector_type"],
        vision_feature_layer=layers.get(layer, layer) if isinstance(layer, int) else layer,
        look_close_mode=root.get("look_close_mode") or ("after_prompt" if head else "after_image"),
        num_look_close=1 if root.get("num_look_close") is None else root["num_look_close"],
        num_token_look_close=root.get("num_token_look_close"),
        smooth_selection_prob=bool(root.get("smooth_selection_prob")),
        top_down_prompt_head_type=head,
        high_res_pos_embed="high_res_pos_embed" in weights,
        token_selection_loss_weight=float(root.get("token_selection_loss_weight") or 0.0),
        original_options={key: value for key, value in root.items() if key not in noise and value is not None},
        image_token_id=token_id(tokenizer, VilaProcessor.image_token),
        video_token_id=token_id(tokenizer, VilaProcessor.video_token),
        user_end_ids=user_end_ids(str(tokenizer.chat_template), tokenizer),
    )


def to_vila_hd_processor(
    root: dict[str, Any], preprocessor: dict[str, Any], config: VilaHDConfig, tokenizer: PreTrainedTokenizerBase
) -> VilaHDProcessor:
    """Root config, the tower's `preprocessor_config.json` and the tokenizer -> processor."""
    return VilaHDProcessor(
        to_ps3_image_processor(preprocessor, config),
        tokenizer,
        chat_template=str(tokenizer.chat_template),
        num_tile_tokens=config.num_tile_tokens,
        # frames are pictures here, whatever encoder of videos a config names
        **{**to_processor_options(root), "video_as_images": True},
    )


def to_ps3_image_processor(preprocessor: dict[str, Any], config: Ps3Config | VilaHDConfig) -> VilaImageProcessor:
    """PS3's `preprocessor_config.json`: a picture is squeezed into the square of the largest scale.

    Raises:
        ValueError: if its size is not that of the encoder.
    """
    side = preprocessor.get("image_size") or config.vision_config.input_size
    side = side[0] if isinstance(side, (list, tuple)) else side

    def channels(name: str, default: Any) -> list[float]:
        values = preprocessor.get(name) or preprocessor.get(f"image_{name}") or default
        return [values] * 3 if isinstance(values, (int, float)) else list(values)

    is_bilinear = preprocessor.get("interpolation") == "bilinear"
    is_encoder = isinstance(config, Ps3Config)
    processor = (Ps3ImageProcessor if is_encoder else VilaImageProcessor)(
        image_mode="plain" if is_encoder else "resize",
        size=square(side),
        image_mean=channels("mean", OPENAI_CLIP_MEAN),
        image_std=channels("std", OPENAI_CLIP_STD),
        resample=PILImageResampling.BILINEAR if is_bilinear else PILImageResampling.BICUBIC,
    )
    if side != config.vision_config.input_size:
        raise ValueError(
            f"preprocessor_config.json gives pictures of {side} pixels per side, the encoder's largest scale has "
            f"{config.vision_config.input_size}"
        )
    check_image_processor(processor, side)
    return processor


def number(config: dict[str, Any], key: str, default: Any, kind: Any = int) -> Any:
    """An option that is computed with.

    Raises:
        ValueError: if it is no positive number.
    """
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value <= MAX_SIZE:
        raise ValueError(f"{key} must be a positive number of at most {MAX_SIZE}, got {value!r}")
    return value


def part_of(config: dict[str, Any], key: str) -> dict[str, Any]:
    """An option that holds options, or nothing."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must hold options, got {value!r}")
    return value


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids: Any = tokenizer.convert_tokens_to_ids(token)
    return ids


def to_original_hd_configs(config: VilaHDConfig, processor: VilaHDProcessor) -> dict[str, dict[str, Any]]:
    """The way back: file name -> content of an original VILA-HD folder's configs."""
    vision, image_processor = config.vision_config, processor.image_processor
    llm, tower = original_text_config(config.text_config), to_original_ps3_tower(config.vision_config)
    projector = to_original_projector(config)
    root: dict[str, Any] = {
        "architectures": ["LlavaTopDownLlamaModel"],
        "model_type": "llava_topdown_llama",
        **(config.original_options or {}),
        **{f"{kind}_encoder": encoder(f"Basic{kind.title()}Encoder") for kind in ("image", "video")},
        **to_original_encoders(processor),
        "hidden_size": config.text_config.hidden_size,
        "mm_hidden_size": vision.hidden_size,
        "image_aspect_ratio": "resize",
        "min_tiles": image_processor.min_tiles,
        "max_tiles": image_processor.max_tiles,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch",
        "mm_low_res_token_num": (vision.image_size // vision.patch_size) ** 2,
        "mm_scale_num": len(vision.ps3_scales),
        "ps3": True,
        "look_close_mode": config.look_close_mode,
        "num_look_close": config.num_look_close,
        "num_token_look_close": config.num_token_look_close,
        "smooth_selection_prob": config.smooth_selection_prob,
        "top_down_prompt_head_type": config.top_down_prompt_head_type,
        "high_res_pos_embed": config.high_res_pos_embed,
        "token_selection_loss_weight": config.token_selection_loss_weight,
        "llm_cfg": llm,
        "vision_tower_cfg": tower,
        "mm_projector_cfg": projector,
    }
    return {
        "config.json": root,
        "llm/config.json": llm,
        "vision_tower/config.json": tower,
        "vision_tower/preprocessor_config.json": original_ps3_preprocessor(vision.input_size, image_processor),
        "mm_projector/config.json": projector,
    }


def encoder(name: str) -> str:
    return json.dumps({"_target_": ENCODER_TARGET + name})


def to_original_ps3_tower(vision: Ps3VisionConfig) -> dict[str, Any]:
    """Inverse of `to_ps3_vision_config`; a trunk that no name stands for is described by `trunk_args`."""
    is_radio, width, patch = vision.position_mode == "crop", vision.hidden_size, vision.patch_size
    shape = (patch, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size)
    name = None
    for known, (size, side, depth, heads, ratio) in TRUNKS.items():
        has_grid = is_radio or side // size == vision.position_grid
        if name is None and has_grid and (size, depth, heads, int(width * ratio)) == shape:
            name = known
    tower: dict[str, Any] = {
        "architectures": ["PS3VisionModel"],
        "model_type": "ps3_vision_model",
        **{key: getattr(vision, key) for key in KEPT},
        "model_name": name,
        "vision_tower_name": name,
        "image_size": vision.input_size,
        "patch_size": patch,
        "img_size": vision.position_grid * patch if is_radio or name is None else None,
        "class_token": False if is_radio else None,
        "dynamic_img_size": True,
        "pool": "map",
        "radio": is_radio,
        "final_norm": is_radio and vision.final_norm,
        "torch_dtype": str(vision.dtype).removeprefix("torch."),
    }
    if is_radio:
        tower |= {**RADIO_ADAPTER, "radio_adapter_mlp_input_dim": width}
    if name is None:
        # half a channel more: the product is rounded down
        tower["trunk_args"] = {
            "patch_size": patch,
            "embed_dim": width,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": (vision.intermediate_size + 0.5) / width,
            "class_token": False,
            "global_pool": "map",
        }
    return tower


def original_ps3_preprocessor(side: int, image_processor: VilaImageProcessor) -> dict[str, Any]:
    mean, std = list(image_processor.image_mean), list(image_processor.image_std)
    is_bilinear = image_processor.resample == PILImageResampling.BILINEAR
    return {
        "image_processor_type": "PS3ImageProcessor",
        "image_size": [side, side],
        "mean": mean,
        "std": std,
        "image_mean": mean,
        "image_std": std,
        "interpolation": "bilinear" if is_bilinear else "bicubic",
        "resize_mode": "squash",
        "size": {"shortest_edge": side},
        "crop_size": square(side),
    }
