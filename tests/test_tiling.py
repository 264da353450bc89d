"""Views that are cut in threads are those that are cut one after the other."""

import numpy as np
import pytest
import torch
from PIL import Image
from vila.geometry_vila import TileGrid
from vila.image_processing_vila import VilaImageProcessor
from vila.media_policy_vila import MediaPolicy
from vila.tiling_vila import cut_views, in_threads


@pytest.fixture(scope="module", autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_views_come_grid_by_grid_and_row_by_row():
    picture = noise(130, 70)
    grids = [TileGrid(1, 1), TileGrid(2, 3), TileGrid(1, 2)]
    views = cut_views(picture, grids, 16, MediaPolicy())
    assert len(views) == 9
    position = iter(views)
    for rows, cols in grids:
        resized = np.asarray(picture.resize((16 * cols, 16 * rows), Image.Resampling.BICUBIC))
        for row in range(rows):
            for col in range(cols):
                expected = resized[16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
                assert np.array_equal(np.asarray(next(position)), expected)


@pytest.mark.parametrize("options", [{"image_mode": "dynamic"}, {"image_mode": "dynamic_s2", "s2_scales": [32, 64]}])
def test_threads_change_no_pixel(options):
    processor = VilaImageProcessor(size={"height": 32, "width": 32}, tile_multiple_images=True, **options)
    pictures = [noise(200, 100), noise(90, 300), noise(64, 64)]
    threaded = processor(pictures)
    torch.set_num_threads(1)
    single = processor(pictures)
    torch.set_num_threads(3)
    assert np.array_equal(threaded["pixel_values"], single["pixel_values"])
    assert np.array_equal(threaded["image_grid_thw"], single["image_grid_thw"])


def test_results_keep_their_order_and_errors_come_through():
    assert in_threads(lambda number: number * 2, range(9)) == list(range(0, 18, 2))
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 / number, [1, 0])
