"""From tiles to embeddings: the vision tower that is used, merging the maps of several scales, and the projectors.

Shape letters: N tiles, L tokens of a tile, D tower channels, S side of a map in patches, T tokens and H channels after
the projector.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel

from .configuration_vila import PLAIN_PROJECTOR, VilaConfig
from .geometry_vila import TileGrid

# Widths of the hidden layers as multiples of the tower's channels; the first is what space-to-channel gives.
PROJECTOR_WIDTHS: dict[str, tuple[float, ...]] = {
    "mlp_downsample": (4,),
    "mlp_downsample_2x2_fix": (4,),
    "mlp_downsample_3x3_fix": (9, 3),
    "mlp_downsample_3x3_s2": (9, 3, 1, 1 / 3),
    "mlp_downsample_3x3_s2_new": (9, 4, 2, 1, 1 / 3),
}


def to_map(features_NLD: torch.Tensor) -> torch.Tensor:
    """`(N, S*S, D)` tokens of square maps -> `(N, S, S, D)`."""
    side = int(features_NLD.shape[1] ** 0.5)
    return features_NLD.unflatten(1, (side, side))


def merge_blocks(maps_NSSD: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """`(rows*cols, S, S, D)` maps in row-major order -> one `(rows*S, cols*S, D)` map."""
    rows_of_maps = maps_NSSD.unflatten(0, grid)
    return rows_of_maps.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def split_blocks(map_SSD: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """Inverse of `merge_blocks`: one map -> `(rows*cols, S, S, D)`."""
    blocks = map_SSD.unflatten(1, (grid.cols, -1)).unflatten(0, (grid.rows, -1))
    return blocks.transpose(1, 2).flatten(0, 1)


def concat_scales(maps: list[torch.Tensor], output_scale: int) -> torch.Tensor:
    """Maps `(..., S_i, S_i, D)` of several scales -> one map with the channels of all, at the size of one of them."""
    size = maps[output_scale].shape[-3:-1]
    resized = []
    for scale_map in maps:
        batched = scale_map.reshape(-1, *scale_map.shape[-3:]).permute(0, 3, 1, 2)
        # float32 as in S2-Wrapper: averaging in half precision would lose bits that the projector was trained on
        pooled = F.interpolate(batched.float(), size=size, mode="area").to(scale_map.dtype)
        resized.append(pooled.permute(0, 2, 3, 1).reshape(*scale_map.shape[:-3], *size, -1))
    return torch.cat(resized, dim=-1)


def pool_video(features_TSSH: torch.Tensor, pool_sizes: Sequence[Sequence[int]] | None) -> torch.Tensor:
    """Temporal-spatial pooling of one video, `(frames, S, S, H) -> (tokens, H)` (TSP, NVILA §3.2).

    Each pooling averages groups of frames, then rows, then columns; the last group is of what is left. The results of
    all poolings follow each other.
    """
    if pool_sizes is None:
        return features_TSSH.flatten(0, 2)
    pooled = []
    for pool in pool_sizes:
        frames = features_TSSH
        for dim, size in enumerate(pool):
            if size > 1:
                frames = torch.stack([group.mean(dim) for group in frames.split(size, dim)], dim)
        pooled.append(frames.flatten(0, 2))
    return torch.cat(pooled)


class VilaSpaceToChannel(nn.Module):
    """Merges `factor` x `factor` patches into one token by concatenating their channels (NVILA §3.1, "compress")."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, features_NLD: torch.Tensor) -> torch.Tensor:
        maps = to_map(features_NLD)
        missing = -maps.shape[1] % self.factor
        # a map that does not divide is padded with zeros at the bottom and the right
        maps = F.pad(maps, (0, 0, 0, missing, 0, missing))
        side = maps.shape[1] // self.factor
        cells = maps.unflatten(2, (side, self.factor)).unflatten(1, (side, self.factor))
        return cells.transpose(2, 3).flatten(3, 5).flatten(1, 2)


class VilaMultiModalProjector(nn.Module):
    """Tower features -> language model embeddings, `(N, L, D) -> (N, T, H)`.

    The layers sit at the indices that the original checkpoints name them by.
    """

    def __init__(self, config: VilaConfig):
        super().__init__()
        channels, hidden = config.feature_size, config.text_config.hidden_size
        kind = config.projector_type
        if kind == "identity":
            self.layers: nn.Module = nn.Identity()
        elif kind == "linear":
            self.layers = nn.Linear(channels, hidden)
        elif match := PLAIN_PROJECTOR.fullmatch(kind):
            modules: list[nn.Module] = [nn.Linear(channels, hidden)]
            for _ in range(int(match.group(1)) - 1):
                modules += [nn.GELU(), nn.Linear(hidden, hidden)]
            self.layers = nn.Sequential(*modules)
        else:
            widths = [int(channels * multiple) for multiple in PROJECTOR_WIDTHS[kind]]
            modules = [VilaSpaceToChannel(config.downsample_factor)]
            for width, next_width in zip(widths, [*widths[1:], hidden]):
                modules += [nn.LayerNorm(width), nn.Linear(width, next_width), nn.GELU()]
            self.layers = nn.Sequential(*modules, nn.Linear(hidden, hidden))

    def forward(self, features_NLD: torch.Tensor) -> torch.Tensor:
        return self.layers(features_NLD)


def build_vision_tower(config: VilaConfig) -> PreTrainedModel:
    """The tower of `config.vision_config` without the layers, final norm and head behind the selected hidden state.

    `last_hidden_state` of the result is the hidden state that `vision_feature_layer` names.
    """
    used = copy.deepcopy(config.vision_config)
    used.num_hidden_layers = config.num_vision_layers
    if hasattr(used, "vision_use_head"):
        used.vision_use_head = False
    tower = AutoModel.from_config(used)
    for norm in ("post_layernorm", "layernorm"):
        if hasattr(tower, norm):
            setattr(tower, norm, nn.Identity())
    config.vision_config._attn_implementation = used._attn_implementation
    # its modules look the attention up in their config, which is to be the one that the whole model's config holds
    for module in tower.modules():
        if getattr(module, "config", None) is used:
            module.config = config.vision_config
    return tower
