"""`VilaProcessor`, and pictures of where VILA-HD looked."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from PIL import Image

from .looking_vila_hd import LookOptions
from .processing_vila import VilaProcessor

# colours of the high-resolution scales, from the second on the last one: what was seen finest is brightest
SCALE_COLORS = ((64, 128, 255), (255, 176, 0), (255, 48, 48))
DIMMED = 0.45
TINT = 0.3


class VilaHDProcessor(VilaProcessor):
    """`VilaProcessor` for VILA-HD: a picture is resized to the encoder's largest scale, as a square."""

    can_stream = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`VilaProcessor.__call__`; arguments of `LookOptions` come back with the rest, for `generate(**inputs)`."""
        looks = {own.name: kwargs.pop(own.name) for own in fields(LookOptions) if own.name in kwargs}
        inputs = super().__call__(*args, **kwargs)
        inputs.update({name: value for name, value in looks.items() if value is not None})
        return inputs

    def continue_chat(self, *args: Any, **kwargs: Any) -> Any:
        """Refused with a `ValueError`: what is looked at depends on the question, and on the whole chat."""
        raise ValueError("VILA-HD looks again for every question: pass the whole chat, with past_key_values")

    def draw_selection(self, image: Image.Image, maps: Sequence[Any], index: int = 0) -> Image.Image:
        """The picture with what was looked at in colour, a tint for each scale, and the rest dimmed.

        Args:
            image: the picture, of any size.
            maps: for each high-resolution scale `(pictures, h, w)` or `(h, w)`, as `generate(...,
                output_selection_maps=True)` returns them; None, where nothing was looked at, dims everything.
            index: which of the pictures it is.

        Returns:
            An RGB picture of the same size.

        Raises:
            ValueError: if the maps have no such picture, or are no maps.
        """
        picture = np.asarray(image.convert("RGB"), dtype=np.float32)
        drawn = picture * DIMMED
        for number, scale in enumerate(maps or ()):
            chosen = np.asarray(scale.float().cpu() if hasattr(scale, "cpu") else scale)
            if chosen.ndim == 3 and 0 <= index < len(chosen):
                chosen = chosen[index]
            if chosen.ndim != 2 or not chosen.size:
                raise ValueError(f"maps of scale {number} hold no map of picture {index}")
            mask = Image.fromarray((chosen > 0).astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
            color = np.array(SCALE_COLORS[min(number, len(SCALE_COLORS) - 1)], dtype=np.float32)
            drawn = np.where(np.asarray(mask)[..., None] > 0, picture * (1 - TINT) + color * TINT, drawn)
        return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))


__all__ = ["VilaHDProcessor"]
