"""An RGB picture -> the views that a tower is shown, cut by Pillow, on several cores where there are several views."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from .geometry_vila import TileGrid, square_padding, tile_boxes
from .media_policy_vila import MediaPolicy


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`[work(item) for item in items]`, in up to as many threads as torch uses; Pillow and numpy let them run."""
    # a data loader's worker has one thread, so that workers do not compete
    threads = min(len(items), torch.get_num_threads())
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def resize(
    picture: Image.Image, width: int, height: int, policy: MediaPolicy, resample: int = Image.Resampling.BICUBIC
) -> Image.Image:
    # Pillow brings every row of the picture to the new width before it changes their number
    policy.check_pixels(width, max(height, picture.height), "resizing the picture")
    return picture.resize((width, height), resample)


def tile_side(size: SizeDict | dict[str, int]) -> int:
    """Side of the square tile; tiling needs one."""
    if size.get("height") != size.get("width") or not size.get("height"):
        raise ValueError(f"tiles are square: size needs equal height and width, got {dict(size)}")
    return size["height"]


def cut_views(picture: Image.Image, grids: list[TileGrid], side: int, policy: MediaPolicy) -> list[Image.Image]:
    """The tiles of every grid, grid by grid, row by row; the grid of one tile is the thumbnail."""

    def cut(grid: TileGrid) -> list[Image.Image]:
        resized = resize(picture, side * grid.cols, side * grid.rows, policy)
        return [resized.crop(box) for box in tile_boxes(grid, side)]

    return [tile for tiles in in_threads(cut, grids) for tile in tiles]


def pad_to_square(picture: Image.Image, mean: float | Sequence[float], policy: MediaPolicy) -> Image.Image:
    """The picture centred on a square of the mean colour."""
    side, left, upper = square_padding(picture.width, picture.height)
    policy.check_pixels(side, side, "padding the picture")
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in np.broadcast_to(mean, 3)))
    square.paste(picture, (left, upper))
    return square


def crop_square(picture: Image.Image) -> Image.Image:
    """The top square of an upright picture, the middle one of others."""
    side = min(picture.size)
    left = (picture.width - side) // 2
    return picture.crop((left, 0, left + side, side))


def center_crop(picture: Image.Image, crop_size: Any, policy: MediaPolicy) -> Image.Image:
    """The middle of the picture; black where the picture is smaller than the crop."""
    policy.check_pixels(crop_size.width, crop_size.height, "cropping the picture")
    left = (picture.width - crop_size.width) // 2
    upper = (picture.height - crop_size.height) // 2
    return picture.crop((left, upper, left + crop_size.width, upper + crop_size.height))
