"""A key-value cache that grows in place: new tokens are written behind the old ones instead of copying all of them."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# tokens that there is room for when a layer grows
ROOM = 256


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` with room behind its keys and values, which are the beginning of larger tensors.

    The room is found by looking at where the keys lie in memory: whatever replaces or shortens them just works.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rooms: dict[str, torch.Tensor] = {}
        self.expected = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DynamicLayer.update`; states are `(batch, key heads, tokens, channels)`."""
        needs_gradient = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if needs_gradient or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, states: Any, new: torch.Tensor) -> torch.Tensor:
        """The old states and the new ones behind them, as the beginning of `rooms[name]`."""
        old = states.shape[-2] if states is not None and states.dim() == 4 else 0
        end = old + new.shape[-2]
        room = self.rooms.get(name)
        if room is None or not old or not is_beginning(states, room) or end > room.shape[-2]:
            tokens = max(end, self.expected) + ROOM
            room = self.rooms[name] = new.new_empty(*new.shape[:2], tokens, new.shape[-1])
            if old:
                room[:, :, :old] = states
        room[:, :, old:end] = new
        return room[:, :, :end]

    def reset(self) -> None:
        self.rooms, self.expected = {}, 0
        super().reset()


def is_beginning(states: Any, room: torch.Tensor) -> bool:
    """Whether `states` are the first tokens of `room`, and `room` may be written to."""
    is_part = states.data_ptr() == room.data_ptr() and states.stride() == room.stride()
    is_frozen = room.is_inference() and not torch.is_inference_mode_enabled()
    return is_part and states.shape[:2] == room.shape[:2] and not is_frozen


def grow_in_place(cache: Any) -> None:
    """Replaces the layers of an empty `DynamicCache` by those that grow in place; leaves all other caches alone."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer for layer in cache.layers
    ]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer


def expect_tokens(cache: Any, tokens: int) -> None:
    """Lets the layers that grow in place make room for so many tokens at once: else every chunk copies all before."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.expected = tokens
