"""Configurations of original VILA-U folders <-> this package's.

An original names the SigLIP that its tower started from and is silent about its shape: the two that were released are
written down here; any other is read from a folder, beside the tower's weights or anywhere on this machine.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from .configuration_vila import first
from .configuration_vila_u import VilaUConfig
from .image_processing_vila import VilaImageProcessor
from .original_config_vila import (
    NOISE,
    SUB_CONFIG_NOISE,
    check_image_processor,
    original_names,
    original_preprocessor,
    original_text_config,
    square,
    to_original_projector,
    without,
)
from .processing_vila_u import IMAGE_START, VIDEO_START, VilaUProcessor
from .sampling_vila_u import DRAWING_DEFAULTS

SIGLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "google/siglip-large-patch16-256": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 256,
        "patch_size": 16,
    },
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
# how the release answers; without sampling it cannot draw
ORIGINAL_GENERATION = {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}
# of a SigLIP that lies beside the tower's weights
SIGLIP_FOLDER = "siglip"
TEXT_SIDE = "rqvaesiglip.siglip_model.text_model."
DEFAULT_SIGLIP = "google/siglip-large-patch16-256"
TRANSLATED = {
    "image_aspect_ratio", "interpolate_mode", "mm_use_im_start_end", "mm_use_vi_start_end", "mm_use_im_patch_token",
    "mm_vision_select_layer", "num_video_frames",
}  # fmt: skip


def to_vila_u_config(
    root: dict[str, Any],
    llm: dict[str, Any],
    tower: dict[str, Any],
    projector: dict[str, Any],
    tower_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> VilaUConfig:
    """Configs of the root and of the three folders -> `VilaUConfig`.

    Args:
        tower_folder: where the tower's weights lie.
        tokenizer: with the media tokens.

    Raises:
        ValueError: for a part that is not supported, or an option that makes no sense.
    """
    if llm.get("model_type") != "llama":
        raise ValueError(f"llm/config.json: model_type {llm.get('model_type')!r} is not 'llama'")
    if "mm_projector_type" not in projector:
        raise ValueError("mm_projector/config.json: mm_projector_type is missing")
    codes = part(tower, "rqvaesiglip", "vision_tower/config.json")
    depth = part(tower, "rqtransformer", "vision_tower/config.json")
    head = part(depth, "head", "vision_tower/config.json: rqtransformer")
    block = part(head, "block", "vision_tower/config.json: rqtransformer.head")
    decoder = part(codes, "ddconfig", "vision_tower/config.json: rqvaesiglip")
    vocabulary = tokenizer.get_vocab()
    if IMAGE_START not in vocabulary:
        raise ValueError(f"llm: the tokenizer lacks {IMAGE_START!r}")
    options = {key: value for key, value in root.items() if key not in NOISE | TRANSLATED and value is not None}
    try:
        config = VilaUConfig(
            text_config=without(llm, SUB_CONFIG_NOISE),
            vision_config=siglip_config(codes.get("pretrained_model") or DEFAULT_SIGLIP, tower_folder),
            projector_type=projector["mm_projector_type"],
            image_token_id=vocabulary[VilaUProcessor.image_token],
            video_token_id=vocabulary[VilaUProcessor.video_token],
            image_start_token_id=vocabulary[IMAGE_START],
            video_start_token_id=vocabulary.get(VIDEO_START),
            codebook_size=codes["n_embed"],
            code_depth=codes["code_shape"][-1],
            shared_codebook=bool(codes.get("shared_codebook", True)),
            depth_hidden_size=depth["embed_dim"],
            depth_num_layers=head["n_layer"],
            depth_num_heads=block["n_head"],
            decoder_channels=decoder["ch"],
            decoder_channel_multipliers=list(decoder["ch_mult"]),
            decoder_num_res_blocks=decoder["num_res_blocks"],
            decoder_attention_resolutions=list(decoder["attn_resolutions"]),
            decoder_resolution=decoder["resolution"],
            decoder_latent_channels=decoder["z_channels"],
            decoder_latent_shape=codes.get("decoder_latent_shape"),
            original_options=options,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"vision_tower/config.json: {error} is missing or makes no sense") from error
    check_grid(config, codes)
    return config


def part(config: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    if not isinstance(config.get(key), dict):
        raise ValueError(f"{name}: {key} is missing")
    return config[key]


def siglip_config(source: str, tower_folder: Path) -> dict[str, Any]:
    """The vision config of a SigLIP that is known, or lies in a folder.

    Raises:
        ValueError: if it is neither.
    """
    if source in SIGLIP_CONFIGS:
        vision: Any = SIGLIP_CONFIGS[source]
    else:
        file = tower_folder / source / "config.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            known = ", ".join(SIGLIP_CONFIGS)
            raise ValueError(
                f"vision_tower/config.json: pretrained_model {source!r} is none of {known}, and no folder with a "
                "config.json in vision_tower/ or on this machine"
            ) from error
        vision = content.get("vision_config", content) if isinstance(content, dict) else None
        if not isinstance(vision, dict):
            raise ValueError(f"vision_tower/{source}/config.json holds no config of a SigLIP")
    return {**without(vision, SUB_CONFIG_NOISE), "model_type": "siglip_vision_model", "vision_use_head": False}


def check_grid(config: VilaUConfig, codes: dict[str, Any]) -> None:
    """Refuses towers whose codes do not lie on the grid of patches: none was released.

    Raises:
        ValueError: naming the shapes.
    """
    grid = list(config.code_grid)
    shapes = list(codes["code_shape"])[:2], list(codes.get("latent_shape") or codes["code_shape"])[:2]
    if any(shape != grid for shape in shapes):
        raise ValueError(
            f"vision_tower/config.json: code_shape {shapes[0]} and latent_shape {shapes[1]} must be the tower's grid "
            f"of patches, {grid}"
        )


def to_vila_u_processor(
    root: dict[str, Any], config: VilaUConfig, tokenizer: PreTrainedTokenizerBase, template: str
) -> VilaUProcessor:
    """The processor; the original takes the size of pictures from the tower and reads no `preprocessor_config.json`.

    Raises:
        ValueError: for a way to show pictures that the original does not have.
    """
    mode = root.get("image_aspect_ratio") or "resize"
    if mode not in ("resize", "pad"):
        raise ValueError(f"config.json: image_aspect_ratio {mode!r} is neither 'resize' nor 'pad'")
    side = first(config.vision_config.image_size)
    image_processor = VilaImageProcessor(
        image_mode=mode,
        size=square(side),
        do_center_crop=True,
        crop_size=square(side),
        image_mean=IMAGENET_STANDARD_MEAN,
        image_std=IMAGENET_STANDARD_STD,
    )
    check_image_processor(image_processor, side)
    return VilaUProcessor(
        image_processor,
        tokenizer,
        chat_template=template,
        num_tile_tokens=config.num_tile_tokens,
        image_end_tokens=None,
        num_video_frames=root.get("num_video_frames") or 8,
    )


def drawing_options(config: VilaUConfig) -> dict[str, Any]:
    """How the release draws, as far as the codebook allows: `drawing` in `generation_config.json`."""
    return {**DRAWING_DEFAULTS, "top_k": min(DRAWING_DEFAULTS["top_k"], config.codebook_size)}


def to_original_u_configs(
    config: VilaUConfig, processor: VilaUProcessor, shapes: dict[str, list[int]]
) -> dict[str, dict[str, Any]]:
    """The way back: file name -> content of an original VILA-U folder's configs.

    Args:
        shapes: name -> shape of the tower's tensors, which tell what the config does not of the text side.
    """
    vision, dtype = config.vision_config, str(config.text_config.dtype).removeprefix("torch.")
    numbers = {name: known for name, known in SIGLIP_CONFIGS.items() if is_siglip(vision, known)}
    siglip = next(iter(numbers), SIGLIP_FOLDER)
    llm, projector = original_text_config(config.text_config), to_original_projector(config)
    tower = to_original_u_tower(config, siglip) | {"torch_dtype": dtype}
    root: dict[str, Any] = {
        "architectures": ["VILAULlamaModel"],
        "model_type": "vila_u_llama",
        **(config.original_options or {}),
        "hidden_size": config.text_config.hidden_size,
        "mm_hidden_size": vision.hidden_size,
        "image_aspect_ratio": processor.image_processor.image_mode,
        "interpolate_mode": "linear",
        "mm_use_im_start_end": True,
        "mm_use_vi_start_end": config.video_start_token_id is not None,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": config.vision_feature_layer,
        "model_dtype": f"torch.{dtype}",
        "num_video_frames": processor.num_video_frames,
        "llm_cfg": llm,
        "vision_tower_cfg": tower,
        "mm_projector_cfg": projector,
    }
    preprocessor = original_preprocessor(config, processor.image_processor)
    files: dict[str, dict[str, Any]] = {
        "config.json": root,
        "llm/config.json": llm,
        "vision_tower/config.json": tower,
        "vision_tower/preprocessor_config.json": preprocessor | {"image_processor_type": "CLIPImageProcessor"},
        "mm_projector/config.json": projector,
    }
    if siglip == SIGLIP_FOLDER:
        files[f"vision_tower/{SIGLIP_FOLDER}/config.json"] = {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "vision_config": without(original_names(vision), {"vision_use_head", "torch_dtype"}),
            "text_config": siglip_text_config(shapes, vision.num_attention_heads),
        }
    return files


def is_siglip(vision: Any, known: dict[str, Any]) -> bool:
    return all(getattr(vision, name) == value for name, value in known.items())


def to_original_u_tower(config: VilaUConfig, siglip: str) -> dict[str, Any]:
    channels, grid, hidden = config.vision_config.hidden_size, list(config.code_grid), config.text_config.hidden_size
    latent = config.decoder_latent_shape
    decoder: dict[str, Any] = {
        "ch": config.decoder_channels,
        "ch_mult": list(config.decoder_channel_multipliers),
        "num_res_blocks": config.decoder_num_res_blocks,
        "attn_resolutions": list(config.decoder_attention_resolutions),
        "resolution": config.decoder_resolution,
        "z_channels": config.decoder_latent_channels,
        "double_z": False,
        "dropout": 0.0,
        "in_channels": 3,
        "out_ch": 3,
    }
    codes: dict[str, Any] = {
        "architectures": ["RQVAESiglipModel"],
        "model_type": "rqvaesiglip_model",
        "pretrained_model": siglip,
        "code_shape": [*grid, config.code_depth],
        "latent_shape": [*grid, channels],
        "decoder_latent_shape": None if latent is None else list(latent),
        "embed_dim": channels,
        "n_embed": config.codebook_size,
        "shared_codebook": config.shared_codebook,
        "restart_unused_codes": True,
        "decay": 0.99,
        "latent_loss_weight": 0.25,
        "ddconfig": decoder,
    }
    depth: dict[str, Any] = {
        "architectures": ["RQTransformer"],
        "model_type": "rqtransformer_model",
        "block_size": [*grid, config.code_depth],
        "embed_dim": config.depth_hidden_size,
        "input_embed_dim_1": channels,
        "input_embed_dim_2": hidden,
        "vocab_size": config.codebook_size,
        "head": {"n_layer": config.depth_num_layers, "block": {"n_head": config.depth_num_heads}},
    }
    names: dict[str, Any] = {"architectures": ["RQVAESIGLIPTransformer"], "model_type": "rqvaesigliptransformer_model"}
    return {**names, "hidden_size": channels, "rqvaesiglip": codes, "rqtransformer": depth}


def siglip_text_config(shapes: dict[str, list[int]], heads: int) -> dict[str, Any]:
    """The text side by its tensors, if it has any; nothing asks for it, but the original builds it.

    Args:
        heads: what no tensor tells; those of the vision side.
    """
    tokens = shapes.get(TEXT_SIDE + "embeddings.token_embedding.weight")
    if tokens is None:
        return {"model_type": "siglip_text_model"}
    layer = TEXT_SIDE + "encoder.layers."
    return {
        "model_type": "siglip_text_model",
        "vocab_size": tokens[0],
        "hidden_size": tokens[1],
        "max_position_embeddings": shapes[TEXT_SIDE + "embeddings.position_embedding.weight"][0],
        "intermediate_size": shapes[layer + "0.mlp.fc1.weight"][0],
        "num_hidden_layers": len({name.split(".")[5] for name in shapes if name.startswith(layer)}),
        "num_attention_heads": heads,
    }
