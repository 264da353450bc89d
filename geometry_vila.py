"""Where pictures are cut and how many tokens they become: plain functions on integers.

The image processor cuts with these functions, the processor counts with them and the model merges with them, so that
the three cannot disagree. Sizes are in pixels unless a name says tokens or patches; a grid counts tiles.

- A *tile* is one square the vision tower sees, a *thumbnail* the whole picture squeezed into one tile (NVILA §3.1,
  https://arxiv.org/abs/2412.04468).
- *S2* runs the tower on several scales of a picture and concatenates the channels (https://arxiv.org/abs/2403.13043);
  *dynamic S2* replaces the largest scale by a grid that fits the picture's aspect ratio (NVILA §3.1).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

MAX_TILES = 1024  # the time to list the candidate grids grows with its square
# in `image_tile_ids`, which engines pass from the processor to the model: the place of a tile's features, and no id
FEATURES, NOTHING = -2, -1


class TileGrid(NamedTuple):
    """Rows and columns of tiles; `(1, 1)` is a picture that was not cut."""

    rows: int
    cols: int

    @property
    def area(self) -> int:
        return self.rows * self.cols


class Box(NamedTuple):
    """A crop box in pixels, in the order that `PIL.Image.crop` takes."""

    left: int
    upper: int
    right: int
    lower: int


@lru_cache(maxsize=64)
def tile_grid_candidates(min_tiles: int, max_tiles: int) -> tuple[TileGrid, ...]:
    """All grids of `min_tiles` to `max_tiles` tiles, smaller ones first.

    Grids of equal area keep the iteration order of a set of `(cols, rows)` tuples, since ties between equally good
    aspect ratios are broken by position and the released checkpoints were trained with that order.
    """
    if not 1 <= min_tiles <= max_tiles <= MAX_TILES:
        raise ValueError(
            f"need 1 <= min_tiles <= max_tiles <= {MAX_TILES}, got min_tiles={min_tiles} and max_tiles={max_tiles}"
        )
    sizes = {
        (cols, rows)
        for longest in range(min_tiles, max_tiles + 1)
        for cols in range(1, longest + 1)
        for rows in range(1, min(longest, max_tiles // cols) + 1)
        if cols * rows >= min_tiles
    }
    return tuple(TileGrid(rows, cols) for cols, rows in sorted(sizes, key=lambda size: size[0] * size[1]))


def choose_tile_grid(width: int, height: int, tile_size: int, min_tiles: int, max_tiles: int) -> TileGrid:
    """The grid whose aspect ratio is nearest to the picture's.

    Of equally near grids a later, larger one is taken only if the picture has more than half of its pixels, so that
    small square pictures are not blown up.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture needs at least one pixel in width and height, got {width}x{height}")
    require_positive(tile_size=tile_size)
    aspect_ratio = width / height
    best, best_difference = TileGrid(1, 1), math.inf
    for grid in tile_grid_candidates(min_tiles, max_tiles):
        difference = abs(aspect_ratio - grid.cols / grid.rows)
        fills_half = width * height > 0.5 * tile_size * tile_size * grid.area
        if difference < best_difference or (difference == best_difference and fills_half):
            best, best_difference = grid, difference
    return best


def tile_boxes(grid: TileGrid, tile_size: int) -> list[Box]:
    """Crop boxes of a picture already resized to the grid, row by row."""
    return [
        Box(col * tile_size, row * tile_size, (col + 1) * tile_size, (row + 1) * tile_size)
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]


def square_padding(width: int, height: int) -> tuple[int, int, int]:
    """`(side, left, upper)` of the square that a picture is centred on."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def scale_splits(scales: Sequence[int]) -> list[int]:
    """Tiles per side of every scale of dynamic S2, e.g. `[448, 896, 1344] -> [1, 2, 3]`."""
    if not scales or scales[0] < 1 or list(scales) != sorted(set(scales)):
        raise ValueError(f"s2_scales must be different positive numbers in ascending order, got {list(scales)}")
    return [scale // scales[0] for scale in scales]


def min_dynamic_s2_tiles(scales: Sequence[int]) -> int:
    """Tiles of the largest scale if it were square: the fewest that dynamic S2 chooses a grid from."""
    return scale_splits(scales)[-1] ** 2


def num_tiles(grid: TileGrid, scales: Sequence[int] | None = None) -> int:
    """Tiles that one picture becomes.

    Without `scales`: the grid plus a thumbnail if it was cut. With the `scales` of dynamic S2: the squares of the
    smaller scales plus the grid of the largest; a picture that was not cut is one tile.
    """
    if scales is None:
        return grid.area + (grid.area > 1)
    if grid.area == 1:
        return 1
    return sum(splits**2 for splits in scale_splits(scales)[:-1]) + grid.area


def output_blocks(grid: TileGrid, scales: Sequence[int], output_scale: int) -> TileGrid:
    """Blocks that the merged map of a dynamic S2 picture is projected in: the grid of the scale it is resized to."""
    splits = scale_splits(scales)
    if not -len(splits) <= output_scale < len(splits):
        raise ValueError(f"output_scale={output_scale} is outside of the {len(splits)} scales")
    if grid.area == 1 or output_scale % len(splits) == len(splits) - 1:
        return grid
    return TileGrid(splits[output_scale], splits[output_scale])


def num_image_tokens(
    grid: TileGrid, tile_tokens: int, scales: Sequence[int] | None = None, output_scale: int = 0
) -> int:
    """Feature rows that one picture becomes, without the tokens around it.

    Args:
        grid: how the picture was cut.
        tile_tokens: rows of one tile (dynamic S2: of one block) after the projector.
        scales, output_scale: of dynamic S2, else None.
    """
    blocks = num_tiles(grid) if scales is None else output_blocks(grid, scales, output_scale).area
    return blocks * tile_tokens


def crops_per_side(scale: int, max_split_size: int) -> int:
    """Crops per side that one scale of static S2 is split into."""
    require_positive(scale=scale, max_split_size=max_split_size)
    return math.ceil(scale / max_split_size)


def patches_per_side(image_size: int, patch_size: int) -> int:
    """Patches per side of one tile; pixels beyond the last whole patch are dropped by the patch convolution."""
    require_positive(image_size=image_size, patch_size=patch_size)
    return image_size // patch_size


def downsampled_side(side: int, factor: int) -> int:
    """Tokens per side after the projector merges `factor` x `factor` patches, the map zero-padded where needed."""
    require_positive(factor=factor)
    return math.ceil(side / factor)


def num_tile_tokens(side: int, downsample: int, class_tokens: int = 0) -> int:
    """Tokens of one tile with `side` x `side` patches after the projector.

    `class_tokens` (a CLIP class token that is kept) can only pass a projector that does not downsample.
    """
    require_positive(downsample=downsample)
    if downsample == 1:
        return side * side + class_tokens
    if class_tokens:
        raise ValueError("a projector that merges patches needs a square map: the class token must be dropped")
    return downsampled_side(side, downsample) ** 2


def require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def pooled_frames(frames: int, side: int, pool_sizes: Sequence[Sequence[int]] | None) -> list[tuple[int, int]]:
    """`(frames, tokens per frame)` after every pooling of temporal-spatial pooling (TSP, NVILA §3.2).

    Args:
        frames: frames of the video.
        side: tokens per side of one frame after the projector.
        pool_sizes: `(frames, rows, columns)` that are averaged into one, for every pooling; None pools nothing.
    """
    return [
        (math.ceil(frames / time), math.ceil(side / rows) * math.ceil(side / cols))
        for time, rows, cols in (pool_sizes if pool_sizes is not None else [(1, 1, 1)])
    ]


def sample_frames(total: int, num_frames: int, fps: float = 0.0, video_fps: float = 0.0) -> list[int]:
    """Indices of the frames that are taken from a video of `total` frames, ascending, with repeats where it is short.

    With `fps` at the times 0, 1/fps, 2/fps, ... of a video with `video_fps` frames per second, `num_frames` at most;
    without, `num_frames` spread evenly from the first to the last frame, halves rounded to even.

    Raises:
        ValueError: if there is no frame, none is asked for, or `fps` is given for a video without a rate.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"need at least one frame, got total={total} and num_frames={num_frames}")
    if fps > 0:
        if not video_fps > 0:
            raise ValueError("the video has no frame rate: pass num_frames instead of fps")
        step = 1 / fps
        count = min(num_frames, math.ceil(total / video_fps / step))
        return [min(int(number * step * video_fps), total - 1) for number in range(max(count, 1))]
    if num_frames == 1:
        return [0]
    return [round(number * ((total - 1) / (num_frames - 1))) for number in range(num_frames)]
