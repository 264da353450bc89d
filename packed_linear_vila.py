"""Weights in the order in which a CPU multiplies them: the same answers, faster tokens, for models that only answer.

`torch.nn.functional.linear` brings every weight into oneDNN's blocked order anew for each token. `pack_linears` does
that once and keeps the result in the weight's place.
"""

from typing import Any

import torch
from torch import nn


class PackedLinear(nn.Module):
    """`nn.Linear` for inference; `weight`, and what is saved, are unpacked on demand, bit for bit."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # not a buffer: it cannot be moved or cast
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)

    @property
    def weight(self) -> torch.Tensor:
        return self.packed.to_dense()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


def pack_linears(model: nn.Module) -> nn.Module:
    """Packs the linear layers that every new token goes through, in place; for `generate()` on a CPU in bfloat16.

    They are those of the language model and its head, of VILA-U also the depth transformer's and the projector's.
    Afterwards the model answers as before and can be saved, but neither trained nor moved to another device.

    Raises:
        ValueError: if the language model is not in bfloat16 on a CPU, or this processor or torch has no such kernels.
    """
    whole: Any = model
    parts = [whole.model.language_model, model]
    if hasattr(whole.model, "depth_transformer"):
        parts += [whole.model.depth_transformer, whole.model.multi_modal_projector]
    linears = [
        (parent, name, child)
        for part in parts
        for parent in ([model] if part is model else part.modules())
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if any(child.weight.device.type != "cpu" or child.weight.dtype != torch.bfloat16 for _, _, child in linears):
        raise ValueError("linear layers are packed in bfloat16 on a CPU only: load the model with dtype='bfloat16'")
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("this processor, or this build of torch, does not multiply packed bfloat16 weights")
    with torch.no_grad():
        for parent, name, child in linears:
            setattr(parent, name, PackedLinear(child))
        # the weights lie in a file that is mapped as a whole: it goes when nothing points into it any more
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


__all__ = ["PackedLinear", "pack_linears"]
