"""The int4 linear layer of AWQ's `gemm` format, with torch alone.

- Few rows (a new token) are multiplied by torch's int4 kernel, many (a prompt) by a dequantised copy in bfloat16.
- What is saved are the buffers of the format, which no forward pass changes.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BITS, PER_INT32 = 4, 8
# columns that the nibbles of an int32 hold, from the lowest one
NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
# two nibbles that far apart become two bfloat16 of 128 + nibble by setting the bits of 128
PAIR_MASK, PAIR_128 = 0x000F000F, 0x43004300
ZERO_128 = 128
PAIRS = PER_INT32 // 2
# that torch's int4 kernel of a CPU puts together
ROWS = 64
# more rows than that are faster by way of a dequantised copy
FEW_ROWS = 48
# that are dequantised at a time: they stay in the caches of a CPU
CACHED_WEIGHTS = 2**22
KERNEL_GROUPS = (32, 64, 128, 256)
CUDA_INNER_TILES = 8


SHIFTS = torch.arange(0, BITS * PAIRS, BITS, dtype=torch.int32).view(PAIRS, 1)


class Scratch(threading.local):
    """Memory that every layer writes its weights to in turn: new pages would cost as much as filling them."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.bfloat16)

    def take(self, count: int) -> torch.Tensor:
        if len(self.memory) < count:
            with torch.inference_mode(False):
                self.memory = torch.empty(count, dtype=torch.bfloat16)
        return self.memory[:count]


SCRATCH = Scratch()


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """`(rows, columns / 8)` int32 in AWQ's order -> `(rows, columns)` uint8 of 0 to 15."""
    shifts = torch.empty(PER_INT32, dtype=torch.int32, device=packed.device)
    for place, column in enumerate(NIBBLE_COLUMNS):
        shifts[column] = BITS * place
    return (packed.unsqueeze(-1) >> shifts).bitwise_and_(15).to(torch.uint8).flatten(1)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """`(rows, columns)` of 0 to 15 -> `(rows, columns / 8)` int32 in AWQ's order."""
    nibbles = values.to(torch.int32).unflatten(1, (-1, PER_INT32))
    packed = torch.zeros(nibbles.shape[:2], dtype=torch.int32, device=values.device)
    for place, column in enumerate(NIBBLE_COLUMNS):
        packed |= nibbles[..., column] << (BITS * place)
    return packed


def check_shape(name: str, in_features: int, out_features: int, group_size: int) -> None:
    """
    Raises:
        ValueError: if groups of that size do not divide the layer, or its outputs do not fill whole int32.
    """
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"{name} has {in_features} inputs, which groups of {group_size} do not divide")
    if out_features % PER_INT32:
        raise ValueError(f"{name} has {out_features} outputs, which is no multiple of {PER_INT32}")


class Int4Linear(nn.Module):
    """A linear layer of 4-bit weights, `(nibble - zero) * scale`, in AWQ's `gemm` format.

    Args:
        group_size: inputs that share a scale and a zero.

    Attributes:
        qweight: `(in_features, out_features / 8)` int32.
        qzeros: `(in_features / group_size, out_features / 8)` int32.
        scales: `(in_features / group_size, out_features)` float16.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool = False):
        super().__init__()
        check_shape("a linear layer", in_features, out_features, group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups, packed = in_features // group_size, out_features // PER_INT32
        self.register_buffer("qweight", torch.zeros(in_features, packed, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, packed, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        # what the kernel of a device reads: made when it is first needed, never saved
        self._kernel: tuple[torch.device, torch.Tensor, torch.Tensor] | None = None
        # zeros and scales `(out_features, groups)` of an arranged layer
        self._grid: tuple[torch.Tensor, torch.Tensor] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> "Int4Linear":
        scales = self.scales
        if self._grid is not None and fn(self.qweight[:0]).device.type != "cpu":
            self.qweight, self._grid = self._format_words(), None
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # a model that is cast keeps what its file holds
            self.scales = scales.to(self.scales.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"] = self._format_words()

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._kernel = self._grid = None
        super()._load_from_state_dict(*arguments, **options)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`(in_features, out_features)` weights: the transpose of `nn.Linear`'s."""
        if dtype == torch.bfloat16 and self._grid is None:
            return self._dequantize_bfloat16()
        zeros = unpack_int4(self.qzeros).to(dtype).unsqueeze(1)
        values = self._integers().to(dtype).unflatten(0, (-1, self.group_size))
        return values.sub_(zeros).mul_(self.scales.to(dtype).unsqueeze(1)).flatten(0, 1)

    def _dequantize_bfloat16(self) -> torch.Tensor:
        """A few groups at a time, and without a conversion of integers."""
        zeros = (unpack_int4(self.qzeros).to(torch.bfloat16) + ZERO_128).unsqueeze(1)
        scales = self.scales.to(torch.bfloat16).unsqueeze(1)
        shape = (self.in_features, self.out_features)
        weights = torch.empty(shape, dtype=torch.bfloat16, device=self.qweight.device)
        shifts = torch.arange(0, BITS * PER_INT32 // 2, BITS, dtype=torch.int32, device=weights.device)
        packed = self.qweight.view(len(zeros), self.group_size, -1, 1)
        pairs = weights.view(torch.int32).view(*packed.shape[:-1], len(shifts))
        values = weights.view(len(zeros), self.group_size, -1)
        count = max(1, CACHED_WEIGHTS // values[0].numel())
        for start in range(0, len(zeros), count):
            chunk = slice(start, start + count)
            torch.bitwise_right_shift(packed[chunk], shifts, out=pairs[chunk])
            pairs[chunk].bitwise_and_(PAIR_MASK).bitwise_or_(PAIR_128)
            values[chunk].sub_(zeros[chunk]).mul_(scales[chunk])
        return weights

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.numel() // self.in_features
        needs_grad = torch.is_grad_enabled() and hidden.requires_grad
        if rows <= FEW_ROWS and not needs_grad and hidden.dtype == torch.bfloat16 and self._has_kernel(hidden.device):
            output = self._multiply(hidden.reshape(rows, self.in_features)).view(*hidden.shape[:-1], -1)
        elif self._grid is not None and hidden.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            weight = self._arranged_weights(Scratch() if needs_grad else SCRATCH)
            return F.linear(hidden, weight, None if self.bias is None else self.bias.to(hidden.dtype))
        else:
            output = hidden @ self.dequantize(hidden.dtype)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    @torch.no_grad()
    def arrange(self) -> None:
        """Brings the weights into an order that a CPU dequantises faster, in place; what is saved stays the format.

        They follow each other as `nn.Linear`'s do, in chunks of a few rows. Bits 4p to 4p + 3 of the halves of a
        chunk's int32 are the weights of its quarter p: all shifts and masks run along memory.
        """
        if self._grid is not None or self.qweight.device.type != "cpu" or self.in_features % 2:
            return
        words = self.qweight.t().contiguous()
        even, odd = words[:, ::2], words[:, 1::2]
        for rows, target in self._chunks():
            columns = slice(rows.start // PER_INT32, rows.stop // PER_INT32)
            pairs = (
                SCRATCH.take(PER_INT32 * target.numel()).view(torch.int32).view(-1, PER_INT32, self.in_features // 2)
            )
            for place, column in enumerate(NIBBLE_COLUMNS):
                high = (odd[columns] >> BITS * place).bitwise_and_(15).bitwise_left_shift_(16)
                low = (even[columns] >> BITS * place).bitwise_and_(15)
                torch.bitwise_or(low, high, out=pairs[:, column])
            quarters = pairs.view(PAIRS, -1)
            target.copy_(quarters[0])
            for quarter in range(1, PAIRS):
                target.bitwise_or_(quarters[quarter] << BITS * quarter)
        zeros = unpack_int4(self.qzeros).t().contiguous()
        self._grid = zeros, self.scales.t().contiguous()

    def _chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of `nn.Linear`'s weight, and the int32 that hold them in an arranged layer."""
        count, words = max(1, CACHED_WEIGHTS // self.in_features // ROWS) * ROWS, self.qweight.view(-1)
        for start in range(0, self.out_features, count):
            stop = min(start + count, self.out_features)
            first, last = (row * self.in_features // PER_INT32 for row in (start, stop))
            yield slice(start, stop), words[first:last]

    def _integers(self) -> torch.Tensor:
        """`(in_features, out_features)` uint8 of 0 to 15."""
        if self._grid is None:
            return unpack_int4(self.qweight)
        values = torch.empty(self.out_features, self.in_features, dtype=torch.uint8)
        for rows, words in self._chunks():
            values[rows] = (words >> SHIFTS).bitwise_and_(PAIR_MASK).view(torch.int16).view_as(values[rows])
        return values.t()

    def _integers_by_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """`(rows, in_features)` int32 of 0 to 15, which the scratch may hold until the next ones."""
        if self._grid is None:
            values = self._integers().t()
            yield from ((rows, values[rows].to(torch.int32)) for rows, _ in self._chunks())
            return
        for rows, words in self._chunks():
            count = PER_INT32 * words.numel()
            pairs, values = SCRATCH.take(3 * count).view(torch.int32).split((count // 2, count))
            torch.bitwise_right_shift(words, SHIFTS, out=pairs.view(PAIRS, -1))
            values.copy_(pairs.bitwise_and_(PAIR_MASK).view(torch.int16))
            yield rows, values.view(-1, self.in_features)

    def _format_words(self) -> torch.Tensor:
        """`qweight` as the format has it."""
        return self.qweight if self._grid is None else pack_int4(self._integers())

    def _arranged_weights(self, scratch: "Scratch") -> torch.Tensor:
        """`nn.Linear`'s weight in bfloat16, which the scratch holds until it is used again."""
        assert self._grid is not None
        zeros, scales = (one.float().view(-1) for one in self._grid)
        means, ones, unused = zeros.add_(ZERO_128), torch.ones_like(scales), zeros.new_empty(0)
        weights = scratch.take(self.out_features * self.in_features).view(self.out_features, self.in_features)
        for rows, words in self._chunks():
            values = weights[rows].view(-1)
            pairs = values.view(torch.int32).view(PAIRS, -1)
            torch.bitwise_right_shift(words, SHIFTS, out=pairs)
            pairs.bitwise_and_(PAIR_MASK).bitwise_or_(PAIR_128)
            groups = values.view(1, -1, self.group_size)
            which = slice(
                rows.start * self.in_features // self.group_size, rows.stop * self.in_features // self.group_size
            )
            # (value - mean) * scale in float32 and one pass, with a mean and a scale per group
            torch.native_batch_norm(
                groups, scales[which], None, means[which], ones[which], False, 0.0, 0.0, out=(groups, unused, unused)
            )
        return weights

    def _has_kernel(self, device: torch.device) -> bool:
        if self.group_size not in KERNEL_GROUPS:
            return False
        if device.type == "cpu":
            return self.out_features % 16 == 0
        is_nvidia = device.type == "cuda" and torch.version.hip is None
        return is_nvidia and self.in_features % (CUDA_INNER_TILES * 16) == 0 and self.out_features % 8 == 0

    def _multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        kernel = self._kernel
        if kernel is None or kernel[0] != self.qweight.device:
            kernel = self._kernel = (self.qweight.device, *self._kernel_weights())
        _, weights, scales_and_zeros = kernel
        if hidden.device.type == "cpu":
            return torch.ops.aten._weight_int4pack_mm_for_cpu(hidden, weights, self.group_size, scales_and_zeros)
        return torch.ops.aten._weight_int4pack_mm(hidden, weights, self.group_size, scales_and_zeros)

    @torch.no_grad()
    def _kernel_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights in the kernel's order; scales and, as the kernel wants them, values of the nibble 8."""
        scales = self.scales.float()
        middles = (8 - unpack_int4(self.qzeros).float()) * scales
        scales_and_zeros = torch.stack((scales, middles), -1).to(torch.bfloat16).contiguous()
        if self.qweight.device.type == "cpu":
            packed = torch.empty(self.out_features, self.in_features // 2, dtype=torch.uint8)
            for rows, values in self._integers_by_rows():
                packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
            return packed, scales_and_zeros
        values = self._integers().t().contiguous()
        pairs = (values[:, ::2] << BITS) | values[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), CUDA_INNER_TILES), scales_and_zeros


__all__ = ["BITS", "FEW_ROWS", "Int4Linear", "check_shape", "pack_int4", "unpack_int4"]
