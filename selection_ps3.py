"""Where PS3 looks: scores of the places of a picture, and which patches a number of looks takes (PS3 §3.2, §3.3).

- Every place of the low-resolution grid has one score, for all scales.
- Scores are made once; each look takes the best patches that are left. How many of which scale is plain arithmetic.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_ps3 import Ps3VisionConfig, check_budget
from .vision_ps3 import Ps3Mlp

# pixels per side at which every checkpoint's convolutional net sees the picture
CONV_INPUT_SIZE = 1512
LOGIT_SCALE, MAX_LOGIT = 5, 10
# cells per side that smoothing averages over, whatever the grid
SMOOTH_CELLS = 6
ALL = "all"


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `(B, channels, height, width)`."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Ps3ConvBlock(nn.Module):
    """A ConvNeXt block; its layer scale is called `weight`, as in released checkpoints."""

    def __init__(self, size: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(size, size, 7, padding=3, groups=size)
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.mlp = Ps3Mlp(size, 4 * size)
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        features = self.mlp(self.norm(self.conv_dw(maps).permute(0, 2, 3, 1))) * self.weight
        return maps + features.permute(0, 3, 1, 2)


class Ps3ConvNet(nn.Module):
    """A shallow look at the picture at high resolution, `(B, 3, 1512, 1512) -> (B, out_dim, 54, 54)`."""

    def __init__(self, config: Ps3VisionConfig):
        super().__init__()
        size, kernel = config.highres_selection_module_hidden_dim, config.highres_selection_module_kernel_size
        self.stem = nn.Sequential(nn.Conv2d(3, size, kernel, kernel), ChannelNorm(size, eps=1e-6))
        self.blocks = nn.Sequential(*(Ps3ConvBlock(size) for _ in range(config.highres_selection_module_depth)))
        self.out_proj = nn.Conv2d(size, config.highres_selection_module_out_dim, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.blocks(self.stem(pixels)))


def place_logits(features: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Cosine of every place's features, `(B, D, h, w)`, with the prompt, `(B, D)`."""
    return torch.einsum("bdhw,bd->bhw", F.normalize(features, dim=1), F.normalize(prompt, dim=1))


def to_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """A two-way softmax against 0: exactly the bits by which the original breaks ties."""
    logits = (logits * LOGIT_SCALE).clamp(-MAX_LOGIT, MAX_LOGIT)
    return torch.stack([logits, torch.zeros_like(logits)], -1).softmax(-1)[..., 0]


def at_grids(
    probs: torch.Tensor,
    grids: list[tuple[int, int]],
    gt_selection_maps: torch.Tensor | None = None,
    smooth: bool = False,
) -> list[torch.Tensor]:
    """Probabilities `(B, h0, w0)` -> one `(B, h, w)` map for each high-resolution scale.

    Args:
        gt_selection_maps: `(B, H, W)`; where they are above 0, the probability becomes 1.
        smooth: average over blocks.
    """
    maps = [resize_map(probs, grid, "nearest") for grid in grids]
    if gt_selection_maps is not None:
        wanted = resize_map(gt_selection_maps, grids[0], "area")
        maps = [probs.masked_fill(resize_map(wanted, probs.shape[1:], "nearest") > 0, 1.0) for probs in maps]
    if smooth:
        cells = (SMOOTH_CELLS, SMOOTH_CELLS)
        maps = [resize_map(resize_map(probs, cells, "area"), probs.shape[1:], "nearest") for probs in maps]
    return maps


def resize_map(maps: torch.Tensor, size: Any, mode: str) -> torch.Tensor:
    """`(B, h, w)` maps at another size, in float32 on the way."""
    return F.interpolate(maps.float().unsqueeze(1), size=tuple(size), mode=mode).squeeze(1).to(maps.dtype)


def plan_looks(
    patches: list[int],
    budget: list[int],
    num_look_close: int | str | None = None,
    num_token_look_close: int | str | None = None,
    num_scales: int | None = None,
) -> Iterator[list[int]]:
    """How many patches of each high-resolution scale every look takes.

    Args:
        patches: patches that each scale has.
        budget: patches per look and scale.
        num_look_close: looks; `"all"` stands for as many as the budget needs for all patches. Where it does not have
            the proportions of the scales, a few patches of the smaller ones are left out, as in the original.
        num_token_look_close: patches of all looks together, instead; `"all"` leaves none out.
        num_scales: look at that many of the scales; with `num_look_close` also at the rounding remainder and at one
            patch of each other scale, as in the original.

    Raises:
        ValueError: if a number makes no sense, both or neither are given, or the budget has nothing for those scales.
    """
    check_looks(num_look_close, num_token_look_close, len(patches), num_scales)
    if num_scales is not None and not sum(budget[:num_scales]):
        raise ValueError(f"select_num_each_scale has no patches for the first {num_scales} scales, got {budget}")
    if num_scales is not None and num_token_look_close is not None:
        # a number of patches is kept exactly: none of it is for the other scales
        for counts in plan_looks(patches[:num_scales], budget[:num_scales], None, num_token_look_close):
            yield counts + [0] * (len(patches) - num_scales)
        return
    total, capacity = sum(patches[:num_scales]), sum(budget)
    most = -(-total // capacity)
    if num_look_close is not None:
        sizes = [capacity] * (most if num_look_close == ALL else min(int(num_look_close), most))
    else:
        wanted = total if num_token_look_close == ALL else min(int(num_token_look_close or 0), total)
        sizes = [min(capacity, wanted - start) for start in range(0, wanted, capacity)]
    left = list(patches)
    for size in sizes:
        counts = split_budget(budget, size, num_scales)
        for number, count in enumerate(counts):
            excess = max(count - left[number], 0)
            counts[number] -= excess
            if number + 1 < len(counts):
                counts[number + 1] += excess
        left = [have - count for have, count in zip(left, counts)]
        if any(counts):
            yield counts
    while num_token_look_close == ALL and any(left[:num_scales]):
        # what the proportions of the budget did not reach
        counts, room = [], capacity
        for number, have in enumerate(left):
            counts.append(min(have, room) if number < (num_scales or len(left)) else 0)
            room -= counts[-1]
        left = [have - count for have, count in zip(left, counts)]
        yield counts


def split_budget(budget: list[int], size: int, num_scales: int | None) -> list[int]:
    """Patches of each scale in one look of `size` patches; what rounding leaves over is the last scale's."""
    capacity = sum(budget)
    counts = list(budget)
    if size < capacity:
        counts = [int(count * size / capacity) for count in budget]
        counts[-1] += size - sum(counts)
    if num_scales is not None:
        used, given = sum(counts[:num_scales]), sum(counts)
        counts = [
            int(count / max(used, 1) * given) if number < num_scales else 1 for number, count in enumerate(counts)
        ]
        counts[-1] += capacity - sum(counts)
        counts[0] += min(counts[-1], 0)  # one patch of every other scale may be more than rounding left over
        counts[-1] = max(counts[-1], 0)
    return counts


def check_looks(
    num_look_close: Any, num_token_look_close: Any, num_highres: int, num_scales: Any = None, budget: Any = None
) -> None:
    """Refuses what cannot be a number of looks, before anything is computed.

    Raises:
        ValueError: naming the option.
    """
    if (num_look_close is None) == (num_token_look_close is None):
        raise ValueError("give either num_look_close or num_token_look_close")
    for name, value in (("num_look_close", num_look_close), ("num_token_look_close", num_token_look_close)):
        if value is not None and value != ALL and (type(value) is not int or value < 0):
            raise ValueError(f"{name} must be a whole number of at least 0, or 'all'")
    if num_scales is not None and (type(num_scales) is not int or not 1 <= num_scales <= num_highres):
        raise ValueError(f"only_select_first_n_scale must be 1 to {num_highres}, the high-resolution scales")
    if budget is not None:
        check_budget(budget, num_highres, "select_num_each_scale")


@torch.no_grad()
def choose_patches(probs: list[torch.Tensor], looks: Iterator[list[int]]) -> Iterator[list[torch.Tensor]]:
    """The best patches that are left, look by look.

    Args:
        probs: one `(B, h, w)` map for each high-resolution scale.
        looks: of `plan_looks`.

    Yields:
        For each scale the row-major indices of the chosen patches, `(B, count)`, ascending.
    """
    scores = [scale.flatten(1).clone() for scale in probs]
    for counts in looks:
        chosen = []
        for own, count in zip(scores, counts):
            # a row at a time: how equal scores, all patches of one place, are ordered may depend on the batch
            rows = [row.topk(count, dim=1).indices for row in own.split(1)]
            indices = torch.cat(rows).sort(1).values
            own.scatter_(1, indices, -1.0)
            chosen.append(indices)
        yield chosen
