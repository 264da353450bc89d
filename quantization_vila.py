"""AWQ int4 checkpoints with torch and transformers alone: the linear layer and the quantizer of `from_pretrained`.

- Files are AWQ's `gemm` format, and `config.json` says `awq`, so that other engines read them as well. transformers'
  own quantizer of that name needs gptqmodel: `own_quantization` gives a VILA model ours instead.
- Few rows (a new token) are multiplied by torch's int4 kernel, many (a prompt) by a dequantised copy in bfloat16.
- What is saved are the buffers of the format, which no forward pass changes.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import AwqConfig

METHOD = "vila_awq"
BITS, PER_INT32 = 4, 8
HEAD_BITS = (8, 16)
# columns that the nibbles of an int32 hold, from the lowest one
NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
# two nibbles that far apart become two bfloat16 of 128 + nibble by setting the bits of 128
PAIR_MASK, PAIR_128 = 0x000F000F, 0x43004300
ZERO_128 = 128
# more rows than that are faster by way of a dequantised copy
FEW_ROWS = 32
# that are dequantised at a time
CACHED_WEIGHTS = 10**6
KERNEL_GROUPS = (32, 64, 128, 256)
CUDA_INNER_TILES = 8
HEAD_ROWS = 2**14  # that are rounded at a time


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

    def _apply(self, fn: Any, recurse: bool = True) -> "Int4Linear":
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # a model that is cast keeps what its file holds
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`(in_features, out_features)` weights: the transpose of `nn.Linear`'s."""
        if dtype == torch.bfloat16:
            return self._dequantize_bfloat16()
        zeros = unpack_int4(self.qzeros).to(dtype).unsqueeze(1)
        values = unpack_int4(self.qweight).to(dtype).unflatten(0, (-1, self.group_size))
        return values.sub_(zeros).mul_(self.scales.to(dtype).unsqueeze(1)).flatten(0, 1)

    def _dequantize_bfloat16(self) -> torch.Tensor:
        """A few groups at a time, which stay in the caches of a CPU, and without a conversion of integers."""
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
        else:
            output = hidden @ self.dequantize(hidden.dtype)
        return output if self.bias is None else output + self.bias.to(output.dtype)

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
        values = unpack_int4(self.qweight).t().contiguous()
        if self.qweight.device.type == "cpu":
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), 1), scales_and_zeros
        pairs = (values[:, ::2] << BITS) | values[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), CUDA_INNER_TILES), scales_and_zeros


class Int8Head(nn.Module):
    """An output head of 8-bit weights, made from an ordinary head after loading.

    Scales are powers of two: every weight is a bfloat16 number too, so that what is saved is an ordinary head again,
    from which the same one is made.

    Args:
        head: the layer whose weights are rounded.
        is_tied: whether they are the input embeddings', which are saved themselves, see `Int8Embeddings`.

    Attributes:
        values: `(out_features, in_features)` int8.
        scales: `(out_features,)`, in the head's dtype.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, head: nn.Linear, is_tied: bool):
        super().__init__()
        self.in_features, self.out_features, self.is_tied = head.in_features, head.out_features, is_tied
        weight = head.weight.detach()
        scales = power_of_two_scales(weight)
        values = torch.cat(
            [(rows / scale).round() for rows, scale in zip(weight.split(HEAD_ROWS), scales.split(HEAD_ROWS))]
        )
        self.register_buffer("values", values.to(torch.int8), persistent=False)
        self.register_buffer("scales", scales.squeeze(1).to(weight.dtype), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """`(out_features, in_features)`."""
        return self.values.to(self.scales.dtype).mul_(self.scales.unsqueeze(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.numel() // self.in_features
        needs_grad = torch.is_grad_enabled() and hidden.requires_grad
        if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and rows <= FEW_ROWS and not needs_grad:
            flat = hidden.reshape(rows, self.in_features)
            output = torch.ops.aten._weight_int8pack_mm(flat, self.values, self.scales)
            return output.view(*hidden.shape[:-1], self.out_features)
        return F.linear(hidden, self.weight.to(hidden.dtype))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_tied:
            destination[prefix + "weight"] = self.weight


class Int8Embeddings(nn.Module):
    """Input embeddings that an `Int8Head` shares: its rows, so that nothing is held twice."""

    def __init__(self, head: Int8Head):
        super().__init__()
        self.head = head

    @property
    def weight(self) -> torch.Tensor:
        """`(vocabulary, hidden_size)`."""
        return self.head.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        scales = F.embedding(input_ids, self.head.scales.unsqueeze(1))
        return F.embedding(input_ids, self.head.values).to(scales.dtype).mul_(scales)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


def round_head(model: PreTrainedModel) -> None:
    """Puts an `Int8Head` in the place of the output head, and of the input embeddings if it shares their weights."""
    head: Any = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    rounded = Int8Head(head, is_tied)
    model.set_output_embeddings(rounded)
    if is_tied:
        model.set_input_embeddings(Int8Embeddings(rounded))


def power_of_two_scales(weight: torch.Tensor) -> torch.Tensor:
    """`(rows, 1)` float32: the least powers of two by which every row divided stays within -127 to 127."""
    largest = weight.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float16).tiny)
    return torch.exp2(torch.ceil(torch.log2(largest / 127)))


class VilaAwqConfig(AwqConfig):
    """The ordinary AWQ options, under a method name of our own while a model lives.

    Args:
        head_bits: 8 rounds the output head as well, see `Int8Head`.
    """

    def __init__(self, head_bits: int = 16, **kwargs: Any):
        kwargs.pop("quant_method", None)
        super().__init__(**kwargs)
        self.head_bits = head_bits
        self.quant_method: Any = METHOD
        self.check()

    def check(self) -> None:
        """
        Raises:
            ValueError: for another number of bits, symmetric weights or another format.
        """
        if self.bits != BITS or not self.zero_point or self.format != "gemm":
            raise ValueError(
                f"AWQ checkpoints are read with 4 bits, zero points and the format 'gemm', this one has {self.bits} "
                f"bits, zero_point={self.zero_point} and the format {str(self.format)!r}"
            )
        if self.head_bits not in HEAD_BITS:
            raise ValueError(f"head_bits must be one of {HEAD_BITS}, got {self.head_bits}")

    def to_dict(self) -> dict[str, Any]:
        """What AWQ checkpoints say; the options that the class has in common with GPTQ mean nothing for them."""
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": str(getattr(self.format, "value", self.format)),
            "modules_to_not_convert": self.modules_to_not_convert,
            "head_bits": self.head_bits,
        }


class VilaAwqQuantizer(HfQuantizer):
    """Puts `Int4Linear` in the place of the linear layers before their weights are read."""

    requires_calibration = True
    quantization_config: VilaAwqConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        options = self.quantization_config
        skipped = [*(options.modules_to_not_convert or []), "lm_head"]
        linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
        for name, linear in linears:
            if should_convert_module(name, skipped):
                check_shape(name, linear.in_features, linear.out_features, options.group_size)
                with torch.device("meta"):
                    layer = Int4Linear(
                        linear.in_features, linear.out_features, options.group_size, linear.bias is not None
                    )
                model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.quantization_config.head_bits == 8 and type(model.get_output_embeddings()) is nn.Linear:
            round_head(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        head: Any = model.get_output_embeddings()
        if isinstance(head, Int8Head):
            table = nn.Parameter(head.weight.to(dtype or torch.float32))
            plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
            plain.weight = table
            model.set_output_embeddings(plain)
            if head.is_tied:
                embeddings = nn.Embedding(head.out_features, head.in_features, device="meta")
                embeddings.weight = table
                model.set_input_embeddings(embeddings)
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Int4Linear)]
        for name, layer in layers:
            weight = layer.dequantize(dtype or torch.float32).t().contiguous()
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight)
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.to(weight.dtype))
            model.set_submodule(name, linear)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register_quantization() -> None:
    """Tells transformers; code beside weights may be imported more than once, and the last import counts."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    register_quantization_config(METHOD)(VilaAwqConfig)
    register_quantizer(METHOD)(VilaAwqQuantizer)


def own_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with our quantizer for `awq`; others, and none, are left as they are."""
    options = getattr(config, "quantization_config", None)
    if not isinstance(options, dict) or options.get("quant_method") != "awq":
        return config
    config = copy.deepcopy(config)
    config.quantization_config = {**options, "quant_method": METHOD}
    return config


__all__ = [
    "Int4Linear",
    "Int8Embeddings",
    "Int8Head",
    "VilaAwqConfig",
    "VilaAwqQuantizer",
    "own_quantization",
    "register_quantization",
    "round_head",
]
