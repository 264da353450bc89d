"""What the search knows of the activations: inputs of a decoder layer, and of the linear layers in it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# by which outputs of attention (of whole samples) and MLP (spread over all) are compared; sums are taken from all
JUDGED_TOKENS = 2048
TOKENWISE = "mlp.gate_proj"


@dataclass
class Sample:
    """What a decoder layer is called with for one conversation.

    Attributes:
        hidden: `(1, tokens, hidden_size)`.
        options: its keyword arguments, such as positions.
    """

    hidden: torch.Tensor
    options: dict[str, Any]

    def run(self, layer: nn.Module) -> torch.Tensor:
        device = next(layer.parameters()).device
        output = layer(self.hidden.to(device, torch.float32), **move(self.options, device))
        return output[0] if isinstance(output, tuple) else output


def move(value: Any, device: torch.device) -> Any:
    """Nested tensors on a device, numbers of them in float32."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: move(one, device) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(move(one, device) for one in value)
    return value


class InputStatistics:
    """What the search knows of the inputs of linear layers that share them.

    Args:
        features: how many inputs there are.
        tokens: how many rows will be added.
        group_size: inputs that share a scale.

    Attributes:
        mean: `(features,)` mean of absolute values.
        blocks: `(groups, group_size, group_size)` mean of outer products within groups.
    """

    def __init__(self, features: int, tokens: int, group_size: int, device: torch.device):
        self.tokens, self.group_size = tokens, group_size
        self.mean = torch.zeros(features, device=device)
        self.blocks = torch.zeros(features // group_size, group_size, group_size, device=device)
        # errors are summed over whichever is the smaller: all outer products, or the rows themselves
        self.gram = torch.zeros(features, features, device=device) if tokens > features else None
        self.rows: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor) -> None:
        rows = inputs.detach().flatten(0, -2).float()
        self.mean += rows.abs().sum(0) / self.tokens
        grouped = rows.unflatten(1, (-1, self.group_size)).transpose(0, 1)
        self.blocks.baddbmm_(grouped.transpose(1, 2), grouped, alpha=1 / self.tokens)
        if self.gram is None:
            self.rows.append(rows)
        else:
            self.gram.addmm_(rows.t(), rows, alpha=1 / self.tokens)

    def error(self, change: torch.Tensor) -> float:
        """Mean squared error of outputs for a change `(outputs, features)` of the weights.

        It is `d G d` with the Gram matrix of the inputs: exact, whatever the number of tokens.
        """
        if self.gram is None:
            return sum((rows @ change.t()).square().sum().item() for rows in self.rows) / self.tokens / len(change)
        return ((change @ self.gram) * change).sum().item() / len(change)

    def divided_blocks(self, scales: torch.Tensor) -> torch.Tensor:
        """`blocks` of inputs that are divided by `(features,)` scales."""
        grouped = scales.unflatten(0, (-1, self.group_size))
        return self.blocks / (grouped.unsqueeze(1) * grouped.unsqueeze(2))


def observe(
    layer: nn.Module, samples: list[Sample], watched: dict[str, nn.Linear], group_size: int
) -> tuple[dict[str, InputStatistics], list[dict[str, torch.Tensor]]]:
    """Runs a layer over samples.

    Args:
        watched: linear layers by name.

    Returns:
        statistics by name; for every sample inputs of watched layers by name: what works token by token keeps
        `JUDGED_TOKENS` spread over all samples, the rest those of the first samples with so many tokens.
    """
    device = next(layer.parameters()).device
    tokens = sum(sample.hidden.shape[1] for sample in samples)
    statistics = {
        name: InputStatistics(linear.in_features, tokens, group_size, device) for name, linear in watched.items()
    }
    inputs, judged, step = [], 0, max(1, tokens // JUDGED_TOKENS)
    for sample in samples:
        seen: dict[str, torch.Tensor] = {}

        def note(name: str, value: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
            statistics[name].add(value)
            seen[name] = value

        hooks = [
            linear.register_forward_pre_hook(lambda _, arguments, name=name, note=note: note(name, arguments[0]))
            for name, linear in watched.items()
        ]
        try:
            sample.run(layer)
        finally:
            for hook in hooks:
                hook.remove()
        kept = {name: value[:, ::step].clone() for name, value in seen.items() if name == TOKENWISE}
        if judged < JUDGED_TOKENS:
            kept = seen | kept
            judged += sample.hidden.shape[1]
        inputs.append(kept)
    return statistics, inputs


class Captured(Exception):
    """Ends a forward pass whose rest is not wanted."""


def first_layer_sample(model: Any, inputs: dict[str, torch.Tensor], max_tokens: int) -> Sample:
    """What the first decoder layer is given for one conversation, media encoded and spliced in.

    Args:
        model: a VILA model with a language modelling head.
        inputs: of its `forward`, for one conversation.
        max_tokens: what lies behind is cut off; attention is causal, so nothing else changes.
    """
    found: list[Sample] = []

    def capture(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = {name: value for name, value in options.items() if name not in ("past_key_values", "use_cache")}
        hidden = arguments[0] if arguments else options.pop("hidden_states")
        found.append(cut(hidden, options, max_tokens))
        raise Captured

    hook = model.model.language_model.layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    except Captured:
        pass
    finally:
        hook.remove()
    return found[0]


def cut(hidden: torch.Tensor, options: dict[str, Any], tokens: int) -> Sample:
    length = hidden.shape[1]
    if length > tokens:
        hidden, options = hidden[:, :tokens], cut_options(options, length, tokens)
    return Sample(hidden.detach(), options)


def cut_options(value: Any, length: int, tokens: int) -> Any:
    """Cuts all axes of that length."""
    if isinstance(value, torch.Tensor):
        for axis, size in enumerate(value.shape):
            if size == length:
                value = value.narrow(axis, 0, tokens)
        return value
    if isinstance(value, dict):
        return {name: cut_options(one, length, tokens) for name, one in value.items()}
    return tuple(cut_options(one, length, tokens) for one in value) if isinstance(value, tuple) else value
