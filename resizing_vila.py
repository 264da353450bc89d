"""Pillow's resize on several cores, bit for bit: it works row by row, then column by column, and so do the bands."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

# smaller pictures are done before threads have started
MIN_BAND_PIXELS = 2**18


def in_threads(work: Callable[[Any], Any], items: Iterable[Any], limit: int) -> list[Any]:
    """`[work(item) for item in items]` in up to `limit` threads, at most as many as torch uses."""
    # a data loader's worker has one, so that workers do not compete
    threads = min(limit, torch.get_num_threads())
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def resize_picture(picture: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """`picture.resize(size, resample)`; Pillow lets other threads run meanwhile.

    Args:
        size: `(width, height)` in pixels.
    """
    width, height = size
    bands = min(max(picture.width, width) * max(picture.height, height) // MIN_BAND_PIXELS, torch.get_num_threads())
    if bands < 2 or resample == Image.Resampling.NEAREST:
        return picture.resize(size, resample)
    if width != picture.width:
        rows = cuts(picture.height, bands)
        parts = in_threads(
            lambda row: picture.crop((0, row[0], picture.width, row[1])).resize((width, row[1] - row[0]), resample),
            rows,
            bands,
        )
        picture = joined(parts, (width, picture.height), [(0, start) for start, _ in rows])
    if height != picture.height:
        columns = cuts(width, bands)
        whole = picture
        parts = in_threads(
            lambda column: whole.crop((column[0], 0, column[1], whole.height)).resize(
                (column[1] - column[0], height), resample
            ),
            columns,
            bands,
        )
        picture = joined(parts, size, [(start, 0) for start, _ in columns])
    return picture


def cuts(length: int, count: int) -> list[tuple[int, int]]:
    """`length` in up to `count` parts of nearly equal size, as `(start, end)`."""
    edges = [length * number // count for number in range(count + 1)]
    return [(start, end) for start, end in zip(edges, edges[1:]) if start < end]


def joined(parts: list[Image.Image], size: tuple[int, int], corners: list[tuple[int, int]]) -> Image.Image:
    picture = Image.new(parts[0].mode, size)
    for part, corner in zip(parts, corners):
        picture.paste(part, corner)
    return picture
