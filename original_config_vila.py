"""Configurations of original VILA folders <-> this package's, as plain dictionaries.

Original configs differ by age: every key may be missing, and unknown ones are kept in `original_options`.
"""

import json
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from .configuration_vila import VilaConfig, first, parse_scales
from .image_processing_vila import VilaImageProcessor
from .processing_vila import VilaProcessor

# keys that describe a training run or a file layout, not the model
NOISE = {
    "_name_or_path", "architectures", "auto_map", "chat_template", "drop_path_rate", "hidden_size", "llm_cfg",
    "mm_hidden_size", "mm_projector_cfg", "mm_projector_lr", "model_dtype", "model_type", "resume_path",
    "transformers_version", "torch_dtype", "dtype", "tune_language_model", "tune_mm_projector", "tune_vision_tower",
    "version", "vision_tower_cfg", "vision_tower_lr",
}  # fmt: skip
SUB_CONFIG_NOISE = {
    "_name_or_path", "_attn_implementation_autoset", "architectures", "auto_map", "torch_dtype", "dtype",
    "transformers_version", "tokenizer_model_max_length", "tokenizer_padding_side", "model_max_length",
}  # fmt: skip
TRANSLATED = {
    "dynamic_s2", "image_aspect_ratio", "max_tiles", "min_tiles", "mm_vision_select_feature", "mm_vision_select_layer",
    "s2", "s2_max_split_size", "s2_resize_output_to_scale_idx", "s2_scales", "soft_ce_std", "time_token_ids",
    "num_video_frames", "fps", "video_max_tiles", "image_encoder", "video_encoder", "num_time_tokens",
    "time_token_format",
}  # fmt: skip
ENCODER_TARGET = "llava.model.encoders."

# model_type of an original tower -> its class and its image processor's class there
TOWER_CLASSES = {
    "siglip_vision_model": ("SiglipVisionModel", "SiglipImageProcessor"),
    "clip_vision_model": ("CLIPVisionModel", "CLIPImageProcessor"),
    "intern_vit_6b": ("InternVisionModel", "InternVisionPreprocessor"),
}
LANGUAGE_MODEL_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
PREPROCESSOR_KEYS = ("image_mean", "image_std", "resample", "rescale_factor", "do_center_crop", "crop_size", "size")
# InternViT's option -> the option of transformers' InternVL tower
INTERN_OPTIONS = {"qk_normalization": "use_qk_norm", "qkv_bias": "attention_bias", "dropout": "hidden_dropout_prob"}
INTERN_UNUSED = {"drop_path_rate", "initializer_factor", "use_flash_attn"}
INTERN_FIXED = {"norm_type": "rms_norm", "use_mean_pooling": True, "use_absolute_position_embeddings": True}


def to_vila_config(
    root: dict[str, Any], llm: dict[str, Any], tower: dict[str, Any], projector: dict[str, Any], **ids: Any
) -> VilaConfig:
    """Configs of the root and of the three folders -> `VilaConfig`.

    Args:
        ids: `image_token_id`, `video_token_id` and `time_token_ids` of the tokenizer.

    Raises:
        ValueError: for a tower or language model that is not supported, or an option that makes no sense.
    """
    tower_type = tower.get("model_type")
    if tower_type not in TOWER_CLASSES:
        raise ValueError(f"vision_tower/config.json: model_type {tower_type!r} is none of {', '.join(TOWER_CLASSES)}")
    if llm.get("model_type") not in LANGUAGE_MODEL_CLASSES:
        raise ValueError(
            f"llm/config.json: model_type {llm.get('model_type')!r} is none of {', '.join(LANGUAGE_MODEL_CLASSES)}"
        )
    if "mm_projector_type" not in projector:
        raise ValueError("mm_projector/config.json: mm_projector_type is missing")
    # towers with a class token drop it
    default_feature = "cls_patch" if tower_type == "siglip_vision_model" else "patch"
    feature = root.get("mm_vision_select_feature") or default_feature
    if feature not in ("cls_patch", "patch"):
        raise ValueError(f"config.json: mm_vision_select_feature {feature!r} is neither 'cls_patch' nor 'patch'")
    layer = root.get("mm_vision_select_layer")
    scales: dict[str, Any] = {}
    if root.get("s2") or root.get("dynamic_s2"):
        scales = {
            "s2": False if root.get("dynamic_s2") else root.get("s2") or False,
            "dynamic_s2": root.get("dynamic_s2") or False,
            "s2_scales": parse_scales(root.get("s2_scales") or "336,672,1008"),
            "s2_max_split_size": root.get("s2_max_split_size") or 336,
            "s2_resize_output_to_scale_idx": root.get("s2_resize_output_to_scale_idx") or 0,
        }
    options = {key: value for key, value in root.items() if key not in NOISE | TRANSLATED and value is not None}
    video_encoder = encoder_options(root.get("video_encoder"))
    return VilaConfig(
        text_config=without(llm, SUB_CONFIG_NOISE),
        vision_config=to_vision_config(tower),
        projector_type=projector["mm_projector_type"],
        vision_feature_layer=-2 if layer is None else layer,
        vision_feature_select_strategy="full" if feature == "cls_patch" else "default",
        video_pool_sizes=video_encoder.get("pool_sizes"),
        soft_ce_std=float(root.get("soft_ce_std") or 1.0),
        original_options=options,
        **scales,
        **ids,
    )


def encoder_options(encoder: str | dict[str, Any] | None) -> dict[str, Any]:
    """An `image_encoder` or `video_encoder` entry, which is a JSON string or a dictionary."""
    try:
        options = json.loads(encoder) if isinstance(encoder, str) else encoder or {}
    except json.JSONDecodeError as error:
        raise ValueError("config.json: image_encoder or video_encoder is no valid JSON") from error
    if not isinstance(options, dict):
        raise ValueError("config.json: image_encoder and video_encoder must be JSON objects")
    for key in ("start_tokens", "end_tokens", "sep_tokens"):
        if not isinstance(options.get(key, ""), (str, type(None))):
            raise ValueError(f"config.json: {key} of an encoder must be a string")
    if str(options.get("_target_", "")).endswith("TSPVideoEncoder"):
        return {"pool_sizes": [[8, 1, 1]], **options}
    return without(options, {"pool_sizes"})


def to_processor_options(root: dict[str, Any]) -> dict[str, Any]:
    """Tokens around media, and how videos are sampled and shown.

    A checkpoint that names a video encoder is given videos through it; to all others frames are shown as pictures.
    """
    image, video = encoder_options(root.get("image_encoder")), encoder_options(root.get("video_encoder"))
    return {
        "image_start_tokens": image.get("start_tokens"),
        "image_end_tokens": image.get("end_tokens", "\n"),
        "video_as_images": not root.get("video_encoder"),
        "num_video_frames": root.get("num_video_frames") or 8,
        "video_fps": root.get("fps") or 0.0,
        "video_max_tiles": root.get("video_max_tiles") or 1,
        "video_pool_sizes": video.get("pool_sizes"),
        "video_start_tokens": video.get("start_tokens"),
        "video_end_tokens": video.get("end_tokens", "\n"),
        "video_sep_tokens": video.get("sep_tokens"),
        "num_time_tokens": root.get("num_time_tokens") or 0,
        "time_token_format": root.get("time_token_format") or "<t{t}>",
    }


def to_original_encoders(processor: VilaProcessor) -> dict[str, Any]:
    """Inverse of `to_processor_options`; an encoder without options of its own is left out, as in most checkpoints."""
    options: dict[str, Any] = {
        "num_video_frames": processor.num_video_frames,
        "fps": processor.video_fps,
        "video_max_tiles": processor.video_max_tiles,
        "num_time_tokens": processor.num_time_tokens,
        "time_token_format": processor.time_token_format,
    }
    image = {"start_tokens": processor.image_start_tokens, "end_tokens": processor.image_end_tokens}
    if image != {"start_tokens": None, "end_tokens": "\n"}:
        options["image_encoder"] = json.dumps({"_target_": ENCODER_TARGET + "BasicImageEncoder", **image})
    if not processor.video_as_images:
        video: dict[str, Any] = {
            "start_tokens": processor.video_start_tokens,
            "end_tokens": processor.video_end_tokens,
        }
        name = "BasicVideoEncoder"
        if processor.video_pool_sizes is not None:
            name = "TSPVideoEncoder"
            video |= {"sep_tokens": processor.video_sep_tokens, "pool_sizes": processor.video_pool_sizes}
        options["video_encoder"] = json.dumps({"_target_": ENCODER_TARGET + name, **video})
    return options


def to_vision_config(tower: dict[str, Any]) -> dict[str, Any]:
    """A tower's config; InternViT becomes transformers' InternVL tower (RMSNorm, norm of whole queries and keys)."""
    config = without(tower, SUB_CONFIG_NOISE)
    if config["model_type"] != "intern_vit_6b":
        return config
    renamed = {INTERN_OPTIONS.get(key, key): value for key, value in config.items()}
    layer_scale = {"layer_scale_init_value": config.get("initializer_factor", 0.1)}
    return {**without(renamed, INTERN_UNUSED), **INTERN_FIXED, **layer_scale, "model_type": "internvl_vision"}


def to_original_tower(config: VilaConfig) -> dict[str, Any]:
    tower = original_names(config.vision_config)
    if tower["model_type"] == "internvl_vision":
        side, patch = first(config.vision_config.image_size), first(config.vision_config.patch_size)
        back = {new: old for old, new in INTERN_OPTIONS.items()}
        tower = {back.get(key, key): value for key, value in tower.items() if key not in INTERN_FIXED}
        tower["initializer_factor"] = tower.pop("layer_scale_init_value")
        tower |= {"model_type": "intern_vit_6b", "image_size": side, "patch_size": patch}
    return tower | {"architectures": [TOWER_CLASSES[tower["model_type"]][0]]}


def to_image_processor(root: dict[str, Any], preprocessor: dict[str, Any], config: VilaConfig) -> VilaImageProcessor:
    """Root config and the tower's `preprocessor_config.json` -> image processor.

    S2 replaces the tower's input size by the largest scale, dynamic S2 by the smallest.
    """
    mode = root.get("image_aspect_ratio", "resize")
    if (mode == "dynamic_s2") > config.dynamic_s2 or (mode == "dynamic" and config.dynamic_s2):
        raise ValueError(f"config.json: image_aspect_ratio {mode!r} does not fit dynamic_s2={config.dynamic_s2}")
    side = first(config.vision_config.image_size)
    options = tower_preprocessing(config.vision_config.model_type, side)
    options |= {key: preprocessor[key] for key in PREPROCESSOR_KEYS if preprocessor.get(key) is not None}
    if "resize_size" in preprocessor:
        options["size"] = preprocessor["resize_size"]
    if isinstance(options["size"], int):
        is_clip = config.vision_config.model_type == "clip_vision_model"
        options["size"] = {"shortest_edge": options["size"]} if is_clip else square(options["size"])
    if isinstance(options.get("crop_size"), int):
        options["crop_size"] = square(options["crop_size"])
    scale = config.s2_scales[-1] if config.s2 else config.s2_scales[0] if config.dynamic_s2 else None
    if scale is not None:
        side = scale
        options["size"] = {"shortest_edge": scale} if "shortest_edge" in options["size"] else square(scale)
        if options.get("crop_size"):
            options["crop_size"] = square(scale)
    tiling = {key: root[key] for key in ("min_tiles", "max_tiles") if root.get(key) is not None}
    image_processor = VilaImageProcessor(
        image_mode=mode if mode in ("resize", "pad", "dynamic", "dynamic_s2") else "plain",
        s2_scales=config.dynamic_scales,
        **tiling,
        **options,
    )
    check_image_processor(image_processor, side)
    return image_processor


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def tower_preprocessing(tower_type: str, side: int) -> dict[str, Any]:
    """What a tower's image processor does where `preprocessor_config.json` is silent."""
    if tower_type == "clip_vision_model":
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        crop = {"do_center_crop": True, "crop_size": square(side), "size": {"shortest_edge": side}}
        return {"image_mean": mean, "image_std": std, **crop}
    if tower_type == "internvl_vision":
        return {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD, "size": square(side)}
    return {"size": square(side)}


def check_image_processor(image_processor: VilaImageProcessor, side: int) -> None:
    """Shows it a picture: what makes no sense, or gives other sizes than the tower takes, is found now.

    Raises:
        ValueError: naming the option, or both sizes.
    """
    try:
        shape = image_processor(Image.new("RGB", (2 * side, 3 * side)))["pixel_values"].shape
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"the options of the image processor make no sense: {error}") from error
    if shape[2:] != (side, side):
        raise ValueError(
            f"vision_tower/preprocessor_config.json gives pictures of {shape[2]}x{shape[3]} pixels, the tower takes "
            f"{side}x{side}"
        )


def to_original_configs(config: VilaConfig, processor: VilaProcessor) -> dict[str, dict[str, Any]]:
    """The way back: file name -> content of an original folder's configs."""
    image_processor = processor.image_processor
    llm = original_text_config(config.text_config)
    tower = to_original_tower(config)
    projector = to_original_projector(config)
    is_s2 = config.s2 or config.dynamic_s2
    mode = image_processor.image_mode
    root = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        **(config.original_options or {}),
        **to_original_encoders(processor),
        "hidden_size": config.text_config.hidden_size,
        "mm_hidden_size": config.feature_size,
        "image_aspect_ratio": "default" if mode == "plain" else mode,
        "min_tiles": image_processor.min_tiles,
        "max_tiles": image_processor.max_tiles,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if config.vision_feature_select_strategy == "full" else "patch",
        "s2": config.s2,
        "dynamic_s2": config.dynamic_s2,
        "time_token_ids": config.time_token_ids or [],
        "soft_ce_std": config.soft_ce_std,
        "llm_cfg": llm,
        "vision_tower_cfg": tower,
        "mm_projector_cfg": projector,
    }
    if is_s2:
        root["s2_scales"] = ",".join(str(scale) for scale in config.s2_scales)
        root["s2_max_split_size"] = config.s2_max_split_size or config.s2_scales[0]
        root["s2_resize_output_to_scale_idx"] = config.s2_resize_output_to_scale_idx
    return {
        "config.json": root,
        "llm/config.json": llm,
        "vision_tower/config.json": tower,
        "vision_tower/preprocessor_config.json": original_preprocessor(config, image_processor),
        "mm_projector/config.json": projector,
    }


def to_original_projector(config: VilaConfig) -> dict[str, Any]:
    return {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "mm_projector_type": config.projector_type,
        "torch_dtype": str(config.text_config.dtype).removeprefix("torch."),
    }


def original_text_config(text_config: PreTrainedConfig) -> dict[str, Any]:
    """RoPE settings go back to the keys that transformers 4 reads."""
    llm = original_names(text_config)
    rope = dict(llm.pop("rope_parameters", None) or {})
    llm["rope_theta"] = rope.pop("rope_theta", 10000.0)
    llm["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return llm | {"architectures": [LANGUAGE_MODEL_CLASSES[text_config.model_type]]}


def original_names(sub_config: PreTrainedConfig) -> dict[str, Any]:
    """A sub-config's own keys, without those that every config of transformers 5 has."""
    generic = set(PreTrainedConfig().to_dict()) - {"model_type"}
    original = without(sub_config.to_dict(), generic)
    if sub_config.dtype is not None:
        original["torch_dtype"] = str(sub_config.dtype).removeprefix("torch.")
    return original


def original_preprocessor(config: VilaConfig, image_processor: VilaImageProcessor) -> dict[str, Any]:
    side = first(config.vision_config.image_size)
    if config.vision_config.model_type == "internvl_vision":
        return {"image_processor_type": TOWER_CLASSES["intern_vit_6b"][1], "resize_size": side}
    kind = TOWER_CLASSES[config.vision_config.model_type][1]
    size = {"shortest_edge": side} if image_processor.size.get("shortest_edge") else {"height": side, "width": side}
    preprocessor = {
        "image_processor_type": kind,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "resample": int(image_processor.resample),
        "rescale_factor": image_processor.rescale_factor,
        "size": size,
    }
    if image_processor.do_center_crop:
        preprocessor |= {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
    return preprocessor


def without(mapping: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}
