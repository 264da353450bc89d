"""Configuration of VILA-U: a VILA whose tower also quantises what it sees, and which draws in the same codes.

- What understanding needs is `VilaConfig`'s; this adds the codes, the pixel decoder and the depth transformer.
- The grid of codes is the tower's grid of patches: one code position per patch and per language model position.
"""

import math

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_vila import MAX_LAYERS, VilaConfig, first, raise_value_errors, require_positive
from .geometry_vila import patches_per_side

POSITIVE = (
    "codebook_size", "depth_hidden_size", "depth_num_heads", "decoder_channels", "decoder_resolution",
    "decoder_latent_channels",
)  # fmt: skip
# channels per group are normalised together in the pixel decoder: 32 groups, whatever the width
NORM_GROUPS = 32
MAX_DEPTH = 64
# of the decoder: rows or columns of its input, and layers of one level
MAX_LATENT_SIDE = 2**10
MAX_BLOCKS = 64
MAX_LEVELS = 16


@raise_value_errors
@strict
class VilaUConfig(VilaConfig):
    r"""
    Args:
        image_start_token_id: id behind which the model draws a picture.
        video_start_token_id: the same for a video; None if the checkpoint draws none.
        codebook_size: codes that one position may take at every depth.
        code_depth: codes per position: each quantises what the ones before it left over (VILA-U §3.1, RQ-VAE).
        shared_codebook: whether all depths share one codebook.
        depth_hidden_size, depth_num_layers, depth_num_heads: of the transformer that writes the codes of a position,
            one after the other.
        depth_dropout: of its residual branches in training.
        decoder_channels: channels of the pixel decoder's last level.
        decoder_channel_multipliers: factor of every level, from the pixels inwards; each further one halves the
            side.
        decoder_num_res_blocks: residual blocks per level, less one.
        decoder_attention_resolutions: sides of maps that are followed by attention, counted from `decoder_resolution`.
        decoder_resolution: side in pixels that the decoder was made for.
        decoder_latent_channels: channels that enter the decoder.
        decoder_latent_shape: `[rows, columns]` that the codes' map is resized to before it is decoded.

    See `VilaConfig` for the others.

    Raises:
        ValueError: for an option of the wrong type or out of range; the message names it.
    """

    model_type = "vila_u"
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "text_loss", "image_loss"]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="siglip_vision_model", init_kwargs={"vision_use_head": False}
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    image_token_id: int = 32005
    video_token_id: int = 32006
    image_start_token_id: int = 32000
    video_start_token_id: int | None = 32002
    projector_type: str = "mlp2x_gelu"
    codebook_size: int = 16384
    code_depth: int = 4
    shared_codebook: bool = True
    depth_hidden_size: int = 2560
    depth_num_layers: int = 6
    depth_num_heads: int = 40
    depth_dropout: float = 0.1
    decoder_channels: int = 128
    decoder_channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_num_res_blocks: int = 2
    decoder_attention_resolutions: list[int] | tuple[int, ...] = (16,)
    decoder_resolution: int = 256
    decoder_latent_channels: int = 256
    decoder_latent_shape: list[int] | tuple[int, ...] | None = None

    @property
    def code_grid(self) -> tuple[int, int]:
        """Rows and columns of the codes of one picture."""
        side = patches_per_side(first(self.vision_config.image_size), first(self.vision_config.patch_size))
        return side, side

    def validate_options(self) -> None:
        super().validate_options()
        if self.s2 or self.dynamic_s2 or self.downsample_factor > 1 or self.video_pool_sizes is not None:
            raise ValueError("VILA-U has one feature row per code: no s2, dynamic_s2, downsampling or video pooling")
        if self.vision_config.model_type != "siglip_vision_model":
            raise ValueError("VILA-U quantises the patches of a SigLIP tower: vision_config must be one")
        for name in POSITIVE:
            require_positive(getattr(self, name), name)
        require_positive(self.code_depth, "code_depth", MAX_DEPTH)
        require_positive(self.depth_num_layers, "depth_num_layers", MAX_LAYERS)
        if self.depth_hidden_size % self.depth_num_heads:
            raise ValueError(
                f"depth_hidden_size {self.depth_hidden_size} is no multiple of depth_num_heads {self.depth_num_heads}"
            )
        if not 0 <= self.depth_dropout < 1 or math.isnan(self.depth_dropout):
            raise ValueError(f"depth_dropout must be at least 0 and below 1, got {self.depth_dropout}")
        self._check_decoder()

    def _check_decoder(self) -> None:
        require_positive(self.decoder_num_res_blocks, "decoder_num_res_blocks", MAX_BLOCKS)
        multipliers = list(self.decoder_channel_multipliers)
        if not 1 <= len(multipliers) <= MAX_LEVELS:
            raise ValueError(f"decoder_channel_multipliers must hold 1 to {MAX_LEVELS} numbers, got {multipliers}")
        for factor in multipliers:
            require_positive(factor, "decoder_channel_multipliers")
            if self.decoder_channels * factor % NORM_GROUPS:
                raise ValueError(f"decoder_channels x {factor} must be a multiple of {NORM_GROUPS}")
        shape = self.decoder_latent_shape
        if shape is not None:
            if len(shape) != 2:
                raise ValueError(f"decoder_latent_shape must be [rows, columns], got {list(shape)}")
            for side in shape:
                require_positive(side, "decoder_latent_shape", MAX_LATENT_SIDE)


__all__ = ["VilaUConfig"]
