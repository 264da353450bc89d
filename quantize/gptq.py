"""GPTQ (Frantar et al., 2023) by optimum: rounds one input after the other and lets the rest make up for it.

optimum feeds a model token ids only. It is given a decoder layer that looks up what it was called with, so that
pictures and videos take part; the result goes into AWQ's format, which holds the same grids.
"""

from typing import Any

import torch
from torch import nn

from .rounding import Grid
from .search import LINEARS
from .statistics import Sample


class LookedUp(nn.Module):
    """A decoder layer whose input ids are numbers of samples."""

    def __init__(self, layer: nn.Module, samples: list[Sample]):
        super().__init__()
        self.layers, self.samples = nn.ModuleList([layer]), samples

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.samples[int(input_ids)].run(self.layers[0])


def import_quantizer() -> Any:
    """optimum's quantizer, which would pack layers for gptqmodel, and here only tells what it found.

    Raises:
        ModuleNotFoundError: if optimum or gptqmodel is missing.
    """
    try:
        from optimum.gptq import GPTQQuantizer
    except ImportError as error:
        raise ModuleNotFoundError(f"GPTQ needs pip install 'vila-hf[quantize]': {error}") from error

    class Quantizer(GPTQQuantizer):
        def pack_model(self, model: nn.Module, quantizers: dict[str, Any]) -> None:
            self.found = quantizers

        def post_init_model(self, model: nn.Module) -> nn.Module:
            return model

    return Quantizer


@torch.no_grad()
def search_gptq(layer: nn.Module, samples: list[Sample], group_size: int, bits: int) -> dict[str, Grid]:
    """Rounds the linear layers of a decoder layer, in place.

    Args:
        layer: in float32.
        samples: its inputs.

    Returns:
        the grids that the weights now lie on, by name.
    """
    quantizer = import_quantizer()(
        bits=bits,
        dataset=[{"input_ids": [[number]], "attention_mask": [[1]]} for number in range(len(samples))],
        group_size=group_size,
        desc_act=False,
        sym=False,
        model_seqlen=1,
        block_name_to_quantize="layers",
        module_name_preceding_first_block=[],
    )
    quantizer.quantize_model(LookedUp(layer, samples))
    grids = {}
    for name in LINEARS:
        _, scales, zeros, _ = quantizer.found[f"layers.0.{name}"]
        grids[name] = Grid(scales.float(), zeros.float().round(), 2**bits)
    return grids
