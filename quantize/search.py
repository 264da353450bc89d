"""AWQ's search in one decoder layer: scales that protect the inputs that matter, and clipping (Lin et al., AWQ, §3).

- Inputs of a linear layer are divided by `s`, its weights multiplied, and the division is folded into what comes
  before; rounding then errs less where activations are large.
- The error of a linear group is `d G d'` with the Gram matrix of its inputs: exact, and cheaper than passes over all
  tokens. Attention and MLP are judged by their own outputs.
- Plain rounding is always one of the candidates, so that no group gets worse than it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .rounding import fake_quantize
from .statistics import InputStatistics, Sample, move, observe

STEPS = 20  # of the exponent
CLIP_STEPS, CLIP_SHARE = 20, 0.5
ROWS_AT_A_TIME = 256
UNCLIPPED = ("q_proj", "k_proj")
LINEARS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


@dataclass(frozen=True)
class Group:
    """Linear layers with the same inputs, and what comes before them."""

    name: str
    before: nn.Module
    linears: tuple[nn.Linear, ...]


@dataclass(frozen=True)
class Found:
    """What the search found for a group.

    Attributes:
        scales: `(in_features,)`.
        loss, plain_loss: mean squared error of the outputs, and that of plain rounding.
    """

    scales: torch.Tensor
    loss: float
    plain_loss: float


def groups_of(layer: Any) -> Iterator[Group]:
    """The groups of a decoder layer of the Llama form, in their order."""
    attention, mlp = layer.self_attn, layer.mlp
    queries = (attention.q_proj, attention.k_proj, attention.v_proj)
    yield Group("self_attn.q_proj", layer.input_layernorm, queries)
    if attention.v_proj.weight.shape == attention.o_proj.weight.shape:  # grouped heads share values
        yield Group("self_attn.o_proj", attention.v_proj, (attention.o_proj,))
    yield Group("mlp.gate_proj", layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
    yield Group("mlp.down_proj", mlp.up_proj, (mlp.down_proj,))


def candidates(mean: torch.Tensor, weights: torch.Tensor, group_size: int, duo: bool) -> Iterator[torch.Tensor]:
    """Scales to try, ones first.

    Args:
        mean: `(in_features,)` mean of absolute inputs.
        weights: `(rows, in_features)` of all layers of a group.
        duo: whether scales also grow where weights are small, as autoawq's do.
    """
    yield torch.ones_like(mean)
    grouped = weights.abs().unflatten(1, (-1, group_size))
    share = (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)
    for step in range(STEPS):
        ratio = step / STEPS
        scales = mean.pow(ratio)
        if duo:
            scales = scales / (share.pow(1 - ratio) + 1e-4)
        scales = scales.clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        yield torch.where(scales.isfinite(), scales, 1.0)


@contextmanager
def changed_weights(linears: tuple[nn.Linear, ...], weights: list[torch.Tensor]) -> Iterator[None]:
    """Other weights for a while; nothing of the old ones is written to."""
    kept = [linear.weight.data for linear in linears]
    try:
        for linear, weight in zip(linears, weights):
            linear.weight.data = weight
        yield
    finally:
        for linear, weight in zip(linears, kept):
            linear.weight.data = weight


def find_scales(
    group: Group,
    statistics: InputStatistics,
    loss: Callable[[list[torch.Tensor]], float],
    size: int,
    bits: int,
    duo: bool,
) -> Found:
    """The best of all candidates.

    Args:
        loss: of other weights in the place of the group's.
        size: of the groups of inputs.
    """
    weights = [linear.weight.data for linear in group.linears]
    best, least, plain = None, float("inf"), float("nan")
    for scales in candidates(statistics.mean, torch.cat(weights), size, duo):
        found = loss([fake_quantize(weight * scales, size, bits) / scales for weight in weights])
        if best is None:
            plain = found
        if best is None or found < least:
            best, least = scales, found
    assert best is not None
    return Found(best, least, plain)


@torch.no_grad()
def fold(group: Group, scales: torch.Tensor) -> None:
    """Multiplies the inputs' weights and divides what comes before: the same function as ever."""
    before: Any = group.before
    if before.weight.ndim == 1:
        before.weight.div_(scales)
    else:
        before.weight.div_(scales.unsqueeze(1))
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scales)
    for linear in group.linears:
        linear.weight.mul_(scales)


def clip(weight: torch.Tensor, blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """`(rows, groups)` largest absolute weights with the least error of outputs.

    Args:
        blocks: `(groups, size, size)` mean outer products of the inputs that this weight multiplies.
    """
    count, size, _ = blocks.shape
    found = []
    for rows in weight.split(ROWS_AT_A_TIME):
        grouped = rows.unflatten(1, (count, size))
        largest = grouped.abs().amax(-1)
        best, least = largest.clone(), torch.full_like(largest, float("inf"))
        for step in range(int(CLIP_STEPS * CLIP_SHARE)):
            limit = largest * (1 - step / CLIP_STEPS)
            clipped = grouped.clamp(-limit.unsqueeze(-1), limit.unsqueeze(-1)).flatten(1)
            errors = (fake_quantize(clipped, size, bits) - rows).unflatten(1, (count, size)).transpose(0, 1)
            loss = ((errors @ blocks) * errors).sum(-1).t()
            is_better = loss < least
            best, least = torch.where(is_better, limit, best), torch.where(is_better, loss, least)
        found.append(best)
    return torch.cat(found)


@torch.no_grad()
def search_layer(layer: Any, samples: list[Sample], size: int, bits: int, duo: bool, clips: bool) -> dict[str, Found]:
    """Scales and clips the weights of a decoder layer, in place; what is left to do is rounding them.

    Args:
        layer: in float32.
        samples: its inputs.
        size: of groups of inputs.

    Returns:
        what was found per group.
    """
    named = dict(layer.named_modules())
    watched = {name: named[name] for name in dict.fromkeys(LINEARS.values())}
    statistics, inputs = observe(layer, samples, watched, size)
    blocks = {name: one.blocks for name, one in statistics.items()}
    found: dict[str, Found] = {}
    for group in groups_of(layer):
        loss = loss_of(layer, group, samples, inputs, statistics)
        found[group.name] = find_scales(group, statistics[group.name], loss, size, bits, duo)
    for group in groups_of(layer):
        scales = found[group.name].scales
        fold(group, scales)
        blocks[group.name] = statistics[group.name].divided_blocks(scales)
    if clips:
        for name, source in LINEARS.items():
            if not name.endswith(UNCLIPPED):
                weight = named[name].weight.data
                limits = clip(weight, blocks[source], bits).repeat_interleave(size, 1)
                weight.clamp_(-limits, limits)
    return found


def loss_of(
    layer: Any,
    group: Group,
    samples: list[Sample],
    inputs: list[dict[str, torch.Tensor]],
    statistics: dict[str, InputStatistics],
) -> Callable[[list[torch.Tensor]], float]:
    """How much worse other weights of a group are."""
    if len(group.linears) == 1:
        (linear,) = group.linears
        return lambda weights: statistics[group.name].error(weights[0] - linear.weight.data)
    if group.name.startswith("mlp"):

        def run(sample: Sample, own: dict[str, torch.Tensor]) -> torch.Tensor:
            return layer.mlp(own["mlp.gate_proj"])
    else:

        def run(sample: Sample, own: dict[str, torch.Tensor]) -> torch.Tensor:
            value = own["self_attn.q_proj"]
            return layer.self_attn(hidden_states=value, **move(sample.options, value.device))[0]

    judged = [(sample, own) for sample, own in zip(samples, inputs) if group.name in own]
    references = [run(sample, own) for sample, own in judged]

    def loss(weights: list[torch.Tensor]) -> float:
        with changed_weights(group.linears, weights):
            errors = [(run(*pair) - one).square() for pair, one in zip(judged, references)]
        return sum(error.sum().item() for error in errors) / sum(error.numel() for error in errors)

    return loss
