"""Rounding weights to few bits: `(integer - zero) * scale` with a scale and a zero per group of inputs.

autoawq's packer is used where it is installed; ours writes the same bits.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..int4_linear_vila import Int4Linear, pack_int4

STORED_BITS = 4


@dataclass(frozen=True)
class Grid:
    """Values that the weights of a layer may take.

    Attributes:
        scales, zeros: `(out_features, groups)` float32; zeros are integers.
        levels: the integers are 0 to `levels - 1`.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    levels: int

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """`(out_features, in_features)` float32, the nearest grid points' integers."""
        grouped = weight.float().unflatten(1, (self.scales.shape[1], -1))
        values = (grouped / self.scales.unsqueeze(-1)).round_().add_(self.zeros.unsqueeze(-1))
        return values.clamp_(0, self.levels - 1).flatten(1)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest grid points: what a packed layer multiplies by."""
        values = self.integers(weight).unflatten(1, (self.scales.shape[1], -1))
        return values.sub_(self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1)).flatten(1)


def grid_of(weight: torch.Tensor, group_size: int, bits: int) -> Grid:
    """The grid from the least to the largest weight of every group."""
    grouped = weight.float().unflatten(1, (-1, group_size))
    least, largest = grouped.amin(-1), grouped.amax(-1)
    scales = (largest - least).clamp_(min=1e-5) / (2**bits - 1)
    zeros = (-(least / scales).round()).clamp_(0, 2**bits - 1)
    return Grid(scales, zeros, 2**bits)


def fake_quantize(weight: torch.Tensor, group_size: int, bits: int) -> torch.Tensor:
    """Weights rounded to their own grid, as float32."""
    return grid_of(weight, group_size, bits).round(weight)


@torch.no_grad()
def pack(linear: nn.Linear, grid: Grid, use_autoawq: bool | None = None) -> Int4Linear:
    """A layer in AWQ's format.

    Args:
        use_autoawq: pack with autoawq; None where it can be imported.

    Raises:
        ModuleNotFoundError: if it cannot, but shall be used.
    """
    groups = grid.scales.shape[1]
    layer = Int4Linear(linear.in_features, linear.out_features, linear.in_features // groups, linear.bias is not None)
    layer.scales = grid.scales.t().contiguous().half()
    packer = None if use_autoawq is False else autoawq_packer()
    if use_autoawq and packer is None:
        raise ModuleNotFoundError("packing with autoawq needs pip install 'vila-hf[quantize]'")
    if packer is not None:
        layer.qweight, layer.qzeros = pack_with_autoawq(packer, linear, grid)
    else:
        layer.qweight = pack_int4(grid.integers(linear.weight).t())
        layer.qzeros = pack_int4(grid.zeros.t())
    if linear.bias is not None:
        layer.bias = linear.bias.detach().clone()
    return layer


@lru_cache(maxsize=1)
def autoawq_packer() -> Any:
    """autoawq's linear layer, or None where it, or something that it needs, is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that it is not developed further
            from awq.modules.linear.gemm import WQLinear_GEMM
    except ImportError:
        return None
    return WQLinear_GEMM


def pack_with_autoawq(packer: Any, linear: nn.Linear, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """`qweight` and `qzeros`. autoawq packs what is on the grid already: other weights would spill into neighbours."""
    rounded = nn.Linear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
    rounded.weight.data = grid.round(linear.weight)
    group_size = linear.in_features // grid.scales.shape[1]
    packed = packer.from_linear(
        rounded, STORED_BITS, group_size, scales=grid.scales.t().contiguous(), zeros=grid.zeros.t().contiguous()
    )
    return packed.qweight, packed.qzeros
