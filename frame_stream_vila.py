"""The pixels of videos that are decoded while the model encodes them: a few frames exist at a time.

- A `FrameStream` stands where `pixel_values` stands; it is no tensor, but has a length, slices and chunks.
- Every pass opens the videos anew, so that the same inputs can be used again. Their files must stay where they are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice, pairwise, repeat
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


class Views(NamedTuple):
    """What the tower is shown of one picture or video: a list, or what gives the views one after the other."""

    length: int
    views: Any

    def cut(self, start: int, stop: int) -> "Views":
        views = self.views
        if callable(views):
            return Views(stop - start, lambda: islice(views(), start, stop))
        return Views(stop - start, views[start:stop])


class FrameStream:
    """Pixels of pictures and videos that are made chunk by chunk.

    Args:
        parts: the views of every picture or video.
        to_pixels: views -> `(views, 3, height, width)`, an array.
    """

    def __init__(
        self, parts: Sequence[Views], to_pixels: Callable[[list], Any], device: Any = None, dtype: Any = None
    ) -> None:
        self.parts, self.to_pixels, self.device, self.dtype = list(parts), to_pixels, device, dtype

    def __len__(self) -> int:
        return sum(part.length for part in self.parts)

    def __getitem__(self, index: slice) -> "FrameStream":
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError("a stream of frames has slices without a step only")
        parts, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.length)
            if low < high:
                parts.append(part if high - low == part.length else part.cut(low, high))
            first += part.length
        return FrameStream(parts, self.to_pixels, self.device, self.dtype)

    def __add__(self, other: "FrameStream") -> "FrameStream":
        return FrameStream(self.parts + other.parts, self.to_pixels, self.device, self.dtype)

    def to(self, *args: Any, **kwargs: Any) -> "FrameStream":
        """As `Tensor.to` with a device, a dtype or both, for the chunks to come."""
        device, dtype = self.device, self.dtype
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                device = value
        return FrameStream(self.parts, self.to_pixels, device, dtype)

    def split(self, size: int | Sequence[int]) -> Iterable[Any]:
        """Chunks of `size` views, made one after the other; or streams of as many views each as a list says."""
        if not isinstance(size, int):
            return [self[start:stop] for start, stop in pairwise(accumulate(size, initial=0))]
        return self.read(repeat(size))

    def read(self, sizes: Iterable[int]) -> Iterator[torch.Tensor]:
        """Tensors `(views, 3, height, width)` of as many views each as `sizes` says, to the end of the stream."""
        views = chain.from_iterable(part.views() if callable(part.views) else part.views for part in self.parts)
        for size in sizes:
            if not (chunk := list(islice(views, size))):
                return
            yield torch.from_numpy(self.to_pixels(chunk)).to(device=self.device, dtype=self.dtype)
        next(views, None)  # the last video ends: its file is closed, its progress shown


def exactly(frames: Iterator[Any], total: int, name: str) -> Iterator[Any]:
    """`total` frames: the last one again for those that cannot be decoded, because the prompt counts all of them."""
    missing, frame = total, None
    for frame in frames:
        missing -= 1
        yield frame
    if 0 < missing < total:
        logger.warning(f"{name}: the last frame stands for {missing} that cannot be decoded")
        yield from repeat(frame, missing)


__all__ = ["FrameStream"]
