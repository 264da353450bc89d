"""AWQ int4 checkpoints with torch and transformers alone: the quantizer of `from_pretrained`, and an int8 head.

- Files are AWQ's `gemm` format, and `config.json` says `awq`, so that other engines read them as well. transformers'
  own quantizer of that name needs gptqmodel: `own_quantization` gives a VILA model ours instead.
- Linear layers become `Int4Linear`; the output head can be rounded to 8 bits behind the loading.
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

from .int4_linear_vila import BITS, FEW_ROWS, Int4Linear, check_shape

METHOD = "vila_awq"
HEAD_BITS = (8, 16)
HEAD_ROWS = 2**14  # that are rounded at a time


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
        values = torch.empty_like(weight, dtype=torch.int8)
        for target, rows, scale in zip(*(one.split(HEAD_ROWS) for one in (values, weight, scales))):
            target.copy_((rows / scale).round())
        self.register_buffer("values", values, persistent=False)
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
    largest = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
    largest = largest.float().clamp_min(torch.finfo(torch.float16).tiny)
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
        if model.dtype == torch.bfloat16:
            for module in model.modules():
                if isinstance(module, Int4Linear):
                    module.arrange()

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
    "Int8Embeddings",
    "Int8Head",
    "VilaAwqConfig",
    "VilaAwqQuantizer",
    "own_quantization",
    "register_quantization",
    "round_head",
]
