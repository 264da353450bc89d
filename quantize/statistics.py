"""What the search knows of the activations: inputs of a decoder layer, and of the linear layers in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


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
    """Sums over all inputs of linear layers that share them.

    Attributes:
        mean: `(in_features,)` mean of absolute values.
        gram: `(in_features, in_features)` mean of outer products: the mean squared error of outputs is
            `d @ gram @ d.T` for an error `d` of the weights.
    """

    def __init__(self, features: int, device: torch.device):
        self.count = 0
        self.absolute = torch.zeros(features, device=device)
        self.products = torch.zeros(features, features, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        rows = inputs.detach().flatten(0, -2).float()
        self.count += len(rows)
        self.absolute += rows.abs().sum(0)
        self.products.addmm_(rows.t(), rows)

    @property
    def mean(self) -> torch.Tensor:
        return self.absolute / self.count

    @property
    def gram(self) -> torch.Tensor:
        return self.products / self.count


def observe(
    layer: nn.Module, samples: Iterable[Sample], watched: dict[str, nn.Linear]
) -> tuple[list[torch.Tensor], dict[str, InputStatistics], list[dict[str, torch.Tensor]]]:
    """Runs a layer over samples.

    Args:
        watched: linear layers by name.

    Returns:
        outputs per sample; statistics by name; inputs of the watched layers by name, per sample.
    """
    device = next(layer.parameters()).device
    statistics = {name: InputStatistics(linear.in_features, device) for name, linear in watched.items()}
    outputs, inputs = [], []
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
            outputs.append(sample.run(layer))
        finally:
            for hook in hooks:
                hook.remove()
        inputs.append(seen)
    return outputs, statistics, inputs


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
