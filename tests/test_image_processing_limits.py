"""Pictures and targets too large: refused before they are decoded, in bounded memory."""

import base64
import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from picture_inputs import CLIP, assert_rejects, black_png, file_bytes, noise, picture, seen, small_processor
from PIL import Image, PngImagePlugin
from vila import VilaImageProcessor
from vila.image_processing_vila import IMAGE_MODES


@pytest.fixture
def two_gigabytes():
    """Fails with MemoryError what would need more than that, instead of bringing the machine down."""
    resource = pytest.importorskip("resource")
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        pytest.skip("needs /proc")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (2 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (1, 10_000_000)], ids=str)
@pytest.mark.parametrize("mode", IMAGE_MODES)
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_extreme_picture_gives_tiles_or_a_value_error_in_bounded_memory(tower, mode, size, two_gigabytes):
    square = {"height": 448, "width": 448}
    options = {"size": square, "image_mode": mode, "s2_scales": [448, 896, 1344]}
    if tower == "clip":
        options |= {**CLIP, "size": {"shortest_edge": 448}, "crop_size": square}
    try:
        pixel_values = VilaImageProcessor(**options)(Image.new("RGB", size))["pixel_values"]
    except ValueError as error:
        assert "max_pixels" in str(error) or "do_center_crop" in str(error)
        assert size != (1, 1) or "do_center_crop" in str(error)
    else:
        assert pixel_values.shape[1:] == (3, 448, 448)


@pytest.mark.parametrize(
    ("source", "height"),
    [
        *itertools.product(["bytes", "data URI"], [12_000, 20_000]),
        # beyond twice its limit Pillow itself refuses to open a file
        *itertools.product(["opened by the caller"], [12_000]),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_before_it_is_decoded(source, height, monkeypatch):
    bomb = black_png(12_000, height)
    assert len(bomb) < 40_000
    decoded = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda image: decoded.append(image.size))
    if source == "data URI":
        bomb = "data:image/png;base64," + base64.b64encode(bomb).decode()
    elif source == "opened by the caller":
        bomb = Image.open(io.BytesIO(bomb))
    with pytest.raises(ValueError, match="max_pixels"):
        small_processor()([bomb])
    assert decoded == []


def test_picture_at_the_pixel_limit_is_read():
    policy = {"max_pixels": 45 * 31}
    assert np.array_equal(seen(file_bytes(picture()), media_policy=policy), noise())
    with pytest.raises(ValueError, match="max_pixels=1395"):
        seen(file_bytes(picture(46, 31)), media_policy=policy)


def test_the_picture_that_engines_plan_with_is_read():
    """vLLM plans its memory with a picture of 10,000 x 10,000 pixels."""
    data = small_processor(image_mode="dynamic")(Image.new("1", (10_000, 10_000)))
    assert len(data["pixel_values"]) == data["image_grid_thw"].prod() + 1


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_enormous_target_is_refused(mode, two_gigabytes):
    scales = [40_000, 80_000]
    options = {"size": {"height": 40_000, "width": 40_000}, "s2_scales": scales, "image_mode": mode}
    assert_rejects(picture(), "max_pixels", **options)


def test_enormous_crop_is_refused(two_gigabytes):
    assert_rejects(picture(), "max_pixels", image_mode="plain", do_center_crop=True, crop_size=100_000)
