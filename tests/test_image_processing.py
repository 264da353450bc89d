"""Pictures to tiles: bit-equal to plain PIL and transformers' own processors, and safe with any input."""

import base64
import functools
import http.server
import io
import itertools
import json
import os
import re
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging
from vila import VilaImageProcessor, image_processing_vila
from vila.geometry_vila import choose_tile_grid
from vila.image_processing_vila import IMAGE_MODES, VilaImagesKwargs

SIDE = 24
SCALES = [SIDE, 2 * SIDE, 3 * SIDE]
SQUARE = {"height": SIDE, "width": SIDE}
CLIP = {
    "size": {"shortest_edge": SIDE},
    "crop_size": SQUARE,
    "do_center_crop": True,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
}
SIZES = [(1, 1), (SIDE, SIDE), (31, 45), (63, 22), (100, 7), (5, 83), (150, 149)]
# pixels come out as 8-bit RGB, so that tests see what the processor made of an input
RAW = {"image_mode": "plain", "do_resize": False, "do_rescale": False, "do_normalize": False}


def noise(width=45, height=31, channels=3):
    return np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(width=45, height=31):
    return Image.fromarray(noise(width, height))


def small_processor(**options):
    return VilaImageProcessor(**{"size": SQUARE, "s2_scales": SCALES, **options})


def pixels_of(images, **options):
    return small_processor(**options)(images)["pixel_values"]


def seen(image, **options):
    """`(height, width, 3)`, the 8-bit RGB that a picture is taken for."""
    return pixels_of([image], **RAW, **options)[0].transpose(1, 2, 0)


def file_bytes(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_rejects(images, match, **options):
    """The input is refused in words of our own, and the same processor object works on."""
    processor = small_processor()
    before = processor(picture())["pixel_values"]
    with pytest.raises(ValueError, match=match) as caught:
        processor(images, **options)
    message = str(caught.value)
    assert len(message) < 400
    assert not re.search(r"SECRET|U0VDUkVU|\bobject at\b|\b0x[0-9a-f]", message)
    assert np.array_equal(processor(picture())["pixel_values"], before)


# bit equality with plain PIL and transformers


def cut(image, cols, rows):
    resized = image.resize((SIDE * cols, SIDE * rows))
    corners = [(SIDE * col, SIDE * row) for row in range(rows) for col in range(cols)]
    return [resized.crop((left, upper, left + SIDE, upper + SIDE)) for left, upper in corners]


def reference_views(image, mode, mean):
    """What the original hands to the tower's own processor."""
    if mode == "resize":
        return [image.resize((SIDE, SIDE))]
    if mode == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return [square]
    if mode == "square":
        left = max(image.width - image.height, 0) // 2
        return [image.crop((left, 0, left + min(image.size), min(image.size)))]
    if mode == "dynamic":
        grid = choose_tile_grid(*image.size, SIDE, 1, 12)
        return cut(image, grid.cols, grid.rows) + ([image.resize((SIDE, SIDE))] if grid.area > 1 else [])
    if mode == "dynamic_s2":
        grid = choose_tile_grid(*image.size, SIDE, 9, 12)
        return cut(image, 1, 1) + cut(image, 2, 2) + cut(image, grid.cols, grid.rows)
    return [image]


def assert_equals_reference(image, mode, tower, options):
    views = reference_views(image, mode, tower.image_mean)
    expected = np.stack([tower(view, return_tensors="np")["pixel_values"][0] for view in views])
    result = pixels_of(image, image_mode=mode, **options)
    assert result.dtype == np.float32
    assert np.array_equal(result, expected)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_siglip_pixels_equal_the_reference(mode, width, height):
    assert_equals_reference(picture(width, height), mode, SiglipImageProcessorPil(size=SQUARE), {})


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("mode", ["resize", "pad", "plain"])
def test_clip_pixels_equal_the_reference(mode, width, height):
    tower = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    assert_equals_reference(picture(width, height), mode, tower, CLIP)


def test_tiles_of_a_clip_tower_go_through_its_own_preprocessing():
    """The tile's side is the crop size; a larger shortest edge then zooms into every tile."""
    edge = SIDE + 6
    tower = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=SQUARE)
    image = picture(90, 40)
    data = small_processor(**{**CLIP, "size": {"shortest_edge": edge}, "image_mode": "dynamic"})([image])
    _, rows, cols = data["image_grid_thw"][0]
    resized = image.resize((SIDE * cols, SIDE * rows))
    corners = [(SIDE * col, SIDE * row) for row in range(rows) for col in range(cols)]
    tiles = [resized.crop((left, upper, left + SIDE, upper + SIDE)) for left, upper in corners]
    tiles.append(image.resize((SIDE, SIDE)))
    assert np.array_equal(data["pixel_values"], tower(tiles, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("crop", [(9, 9), (60, 31), (10, 61), (61, 60)])
def test_crop_larger_than_the_picture_equals_clips(crop):
    crop_size = {"height": crop[0], "width": crop[1]}
    tower = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop_size)
    assert_equals_reference(picture(45, 31), "plain", tower, {**CLIP, "crop_size": crop_size})


channel_triples = st.tuples(*[st.floats(0.01, 1)] * 3)


@settings(max_examples=25, deadline=None, database=None)
@given(channel_triples, channel_triples, st.floats(1e-4, 2))
def test_table_equals_rescaling_and_normalising_of_transformers(mean, std, factor):
    every_value = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)
    options = {"do_resize": False, "image_mean": mean, "image_std": std, "rescale_factor": factor}
    expected = SiglipImageProcessorPil(**options)(every_value, return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels_of(every_value, image_mode="plain", **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_resize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False, "do_rescale": False, "do_normalize": False},
        {"resample": Image.Resampling.NEAREST},
        {"rescale_factor": 0.5},
        {"image_mean": 0.3, "image_std": 0.7},
    ],
    ids=str,
)
def test_inherited_options_do_what_they_do_in_transformers(options):
    expected = SiglipImageProcessorPil(size=SQUARE)(picture(), return_tensors="np", **options)["pixel_values"]
    assert np.array_equal(small_processor(image_mode="plain")(picture(), **options)["pixel_values"], expected)


@pytest.mark.parametrize(("mode", "size"), [("resize", (31, 45)), ("pad", (45, 45)), ("plain", (31, 45))])
def test_pictures_keep_their_size_without_do_resize(mode, size):
    assert pixels_of(picture(), image_mode=mode, do_resize=False).shape == (1, 3, *size)


def test_pictures_of_different_sizes_are_not_batched_without_do_resize():
    assert_rejects([picture(5, 6), picture(6, 5)], "different sizes", image_mode="plain", do_resize=False)


# conversations


@pytest.fixture
def warnings(monkeypatch):
    """Messages of the module's logger, as in a fresh process."""
    messages = []
    logging.warning_once.cache_clear()
    monkeypatch.setattr(image_processing_vila.logger, "warning", lambda message, *args: messages.append(message))
    return messages


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_s2"])
def test_several_pictures_are_untiled_and_that_is_said_once(mode, warnings):
    processor = small_processor(image_mode=mode)
    several = [picture(90, 30), picture(30, 90)]
    data = processor(several)
    processor([*several, *several])
    assert np.array_equal(data["pixel_values"], pixels_of(several, image_mode="plain"))
    assert data["image_grid_thw"].tolist() == [[1, 1, 1]] * 2
    assert len(warnings) == 1
    assert "tile_multiple_images" in warnings[0]


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_s2"])
def test_several_pictures_are_tiled_like_single_ones_on_demand(mode, warnings):
    processor = small_processor(image_mode=mode)
    several = [picture(90, 30), picture(30, 90), picture(1, 1)]
    data = processor(several, tile_multiple_images=True)
    singles = [processor(single) for single in several]
    for name in ("pixel_values", "image_grid_thw"):
        assert np.array_equal(data[name], np.concatenate([single[name] for single in singles]))
    assert warnings == []


def test_nested_list_is_one_conversation_each():
    """A conversation with one picture is tiled beside one with two, which is not."""
    processor = small_processor(image_mode="dynamic")
    lone, first, second = picture(90, 30), picture(30, 90), picture(60, 60)
    data = processor([[lone], [], [first, second]])
    parts = [processor([lone]), processor([first, second])]
    for name in ("pixel_values", "image_grid_thw"):
        assert np.array_equal(data[name], np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("images", [[], [[]], (), [[], []]], ids=str)
def test_no_picture_is_refused(images):
    assert_rejects(images, "no picture")


def test_mixed_nesting_is_refused():
    assert_rejects([picture(), [picture()]], "mixes")


@pytest.mark.parametrize("bad", [np.zeros((6, 6, 5)), b"", "missing.png"], ids=["array", "bytes", "path"])
def test_error_names_the_picture_of_the_batch(bad):
    assert_rejects([[picture()], [picture(), bad]], "^conversation 1: picture 1: ")


# modes of PIL

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def with_transparency(image, transparency):
    """As a file that names one of its colours transparent is read."""
    return Image.open(io.BytesIO(file_bytes(image, transparency=transparency)))


def palette_picture():
    return picture().quantize(colors=16)


EIGHT_BIT_PICTURES = {
    "1": lambda: Image.fromarray(LEVELS > 100),
    "L": lambda: Image.fromarray(LEVELS),
    "LA": lambda: Image.merge("LA", [Image.fromarray(LEVELS), Image.fromarray(LEVELS.T.copy())]),
    "P": palette_picture,
    "PA": lambda: palette_picture().convert("PA"),
    "P, transparent colour": lambda: with_transparency(palette_picture(), 3),
    "P, transparency per colour": lambda: with_transparency(palette_picture(), bytes(range(0, 256, 16))),
    "L, transparent level": lambda: with_transparency(Image.fromarray(LEVELS), 7),
    "RGB, transparent colour": lambda: with_transparency(picture(), (1, 2, 3)),
    "RGBA": lambda: Image.fromarray(noise(channels=4)),
    "RGBX": lambda: picture().convert("RGBX"),
    "CMYK": lambda: picture().convert("CMYK"),
    "YCbCr": lambda: picture().convert("YCbCr"),
    "HSV": lambda: picture().convert("HSV"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", EIGHT_BIT_PICTURES)
def test_eight_bit_picture_is_converted_as_in_the_original(mode):
    """Which drops the alpha channel."""
    image = EIGHT_BIT_PICTURES[mode]()
    assert np.array_equal(seen(image), np.asarray(image.convert("RGB")))


def grey(levels):
    return np.repeat(np.asarray(levels)[..., None], 3, axis=-1)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(LEVELS.astype(np.uint16) * 257),
        Image.fromarray(LEVELS.astype(">u2") * 257),
        Image.fromarray(LEVELS.astype(np.int32)),
        Image.fromarray(LEVELS.astype(np.int32) * 257),
        Image.fromarray(LEVELS.astype(np.float32)),
        Image.fromarray(LEVELS.astype(np.float32) / 255),
    ],
    ids=["I;16", "I;16B", "I", "I with 16 bits", "F of 0-255", "F of 0-1"],
)
def test_deep_picture_is_scaled_to_eight_bits(image):
    assert np.array_equal(seen(image), grey(LEVELS))


def transparent(mode):
    """A red 2x1 picture, transparent on the left and opaque on the right."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0, 0))
    if mode == "P":
        palette = Image.new("P", (2, 1))
        palette.putpalette([255, 0, 0, 255, 0, 0])
        palette.putpixel((1, 0), 1)
        return with_transparency(palette, 0)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
@pytest.mark.parametrize("color", [[0, 0, 0], (255, 255, 255), [9, 99, 200]], ids=str)
def test_transparent_pixels_lie_on_the_background_color(mode, color):
    image = transparent("LA").convert("La") if mode == "La" else transparent(mode)
    left, right = seen(image, background_color=color)[0]
    assert left.tolist() == list(color)
    assert right.tolist() == ([76] * 3 if mode.startswith("L") else [255, 0, 0])


def test_half_transparent_pixels_are_mixed_with_the_background_color():
    image = Image.new("RGBA", (1, 1), (200, 0, 100, 128))
    assert seen(image, background_color=[0, 100, 100])[0, 0] == pytest.approx([100, 50, 100], abs=1)


def test_background_color_leaves_opaque_pictures_alone():
    assert np.array_equal(seen(picture(), background_color=[1, 2, 3]), noise())


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_is_turned_as_its_exif_orientation_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = picture().transpose(TURNS[orientation]) if orientation in TURNS else picture()
    assert np.array_equal(seen(file_bytes(picture(), exif=exif.tobytes())), np.asarray(turned))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_in_the_header_is_that_of_the_upright_picture(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = small_processor().fetch_images(file_bytes(picture(), kind, exif=exif.tobytes()))
    shape = small_processor().process_image(encoded)
    assert (encoded.width, encoded.height) == shape.size == ((31, 45) if orientation > 4 else (45, 31))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_broken_exif_does_not_hide_the_picture(exif):
    assert seen(file_bytes(picture(), "JPEG", exif=exif)).shape == (31, 45, 3)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_animation_is_its_first_frame(kind, options):
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "green", "blue")]
    data = file_bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(seen(data), np.asarray(frames[0]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_fully_transparent_picture_is_its_background(mode):
    image = Image.new("RGBA", (5, 4), (9, 8, 7, 0)).convert(mode)
    if mode == "P":
        image = with_transparency(Image.new("P", (5, 4)), 0)
    assert np.unique(seen(image, background_color=[1, 2, 3]).reshape(-1, 3), axis=0).tolist() == [[1, 2, 3]]
    assert seen(image).shape == (4, 5, 3)


@pytest.mark.parametrize("to_source", [lambda image: image, np.asarray, file_bytes], ids=["picture", "array", "bytes"])
def test_the_same_object_twice_is_two_pictures(to_source):
    image = picture()
    source = to_source(image)
    data = small_processor(image_mode="dynamic")([source, source])
    assert np.array_equal(data["pixel_values"][0], data["pixel_values"][1]) and len(data["pixel_values"]) == 2
    assert np.array_equal(np.asarray(image), noise())


# arrays

NOISE = noise(9, 7)


@pytest.mark.parametrize(
    "array",
    [
        NOISE,
        NOISE / 255,
        (NOISE / 255).astype(np.float32),
        (NOISE / 255).astype(np.float16),
        NOISE.astype(np.float64),
        NOISE.astype(np.float16),
        np.maximum(NOISE - 0.4, 0),
        NOISE.astype(np.int64),
        NOISE.astype(np.uint16) * 257,
        NOISE.transpose(2, 0, 1),
        NOISE.transpose(2, 0, 1) / 255,
        np.asfortranarray(NOISE),
        np.repeat(NOISE, 2, axis=1)[:, ::2],
        NOISE[::-1, ::-1][::-1, ::-1],
        np.dstack([NOISE, LEVELS[:7, :9]]),
        torch.from_numpy(NOISE),
        torch.from_numpy(NOISE).permute(2, 0, 1),
        torch.from_numpy(NOISE / 255).requires_grad_(),
        torch.from_numpy(NOISE.astype(np.float32)).bfloat16(),
    ],
    ids=[
        "uint8",
        "0-1 float64",
        "0-1 float32",
        "0-1 float16",
        "0-255 float64",
        "0-255 float16",
        "0-255 rounded",
        "int64",
        "uint16",
        "channels first",
        "0-1 channels first",
        "Fortran order",
        "strided",
        "negative strides",
        "alpha",
        "tensor",
        "permuted tensor",
        "tensor with gradient",
        "bfloat16",
    ],
)
def test_array_of_any_layout_and_type_is_the_same_picture(array):
    assert np.array_equal(seen(array), NOISE)


@pytest.mark.parametrize(
    "array",
    [LEVELS, LEVELS[..., None], LEVELS[None], torch.from_numpy(LEVELS), LEVELS / 255],
    ids=["2-D", "one channel last", "one channel first", "2-D tensor", "2-D float"],
)
def test_array_of_one_channel_is_grey(array):
    assert np.array_equal(seen(array), grey(LEVELS))


def test_booleans_are_black_and_white():
    assert np.array_equal(seen(LEVELS > 99), grey(255 * (LEVELS > 99)))


def test_input_data_format_decides_where_the_shape_does_not():
    square = noise(3, 3)
    assert np.array_equal(seen(square), square)
    assert np.array_equal(seen(square, input_data_format="channels_last"), square)
    assert np.array_equal(seen(square, input_data_format="channels_first"), square.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((6, 6, 5)), "channels"),
        (np.zeros((6, 6, 2)), "channels"),
        (np.zeros((4, 0, 3)), "non-empty"),
        (np.zeros(4), "dimensions"),
        (np.zeros((2, 4, 4, 3)), "dimensions"),
        (torch.zeros(2, 3, 4, 4), "dimensions"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), np.inf), "0 to 255"),
        (np.full((4, 4, 3), -0.5), "0 to 1"),
        (np.full((4, 4, 3), 256.0), "0 to 255"),
        (np.full((4, 4, 3), -1), "0 to 255"),
        (np.full((4, 4, 3), 1 << 16), "65535"),
        (np.full((4, 4, 3), (1 << 64) - 1, np.uint64), "65535"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "NaN"),
        (np.zeros((4, 4, 3), complex), "array of numbers"),
        (np.array([["SECRET"]]), "array of numbers"),
        (np.array([[object()]]), "array of numbers"),
        (None, "NoneType"),
        ({"url": "SECRET"}, "dict"),
        (io.BytesIO(b"SECRET"), "BytesIO"),
        (3, "dimensions"),
    ],
)
def test_array_that_is_no_picture_is_refused(array, match):
    assert_rejects([picture(), array], match)


# sources


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "noise.png"
    picture().save(path)
    return path


@pytest.mark.parametrize(
    "to_source",
    [
        str,
        Path,
        Image.open,
        Path.read_bytes,
        lambda path: base64.b64encode(path.read_bytes()).decode(),
        lambda path: base64.encodebytes(path.read_bytes()).decode(),
        lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    ],
    ids=["path", "pathlib", "lazy", "bytes", "base64", "base64 in lines", "data URI"],
)
def test_every_source_gives_the_same_picture(to_source, image_file):
    assert np.array_equal(seen(to_source(image_file)), noise())
    assert np.array_equal(pixels_of(to_source(image_file)), pixels_of(picture()))


JPEG = file_bytes(picture(), "JPEG")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("missing.png", "'missing.png'"),
        (Path("missing"), "'missing'"),
        ("file:///etc/hostname.png", "file://"),
        ("ftp://host/cat.png", "existing file"),
        ("", "picture"),
        ("nul\0.png", "existing file"),
        ("\udc80", "base64"),
        ("SECRET!" * 200_000, "base64"),
        (base64.b64encode(b"SECRET").decode(), "base64 string holds no picture"),
        ("data:image/png;base64,SECRET!", "base64"),
        ("data:image/png,SECRET", "must be of the form data:image"),
        ("data:text/plain;base64,U0VDUkVU", "must be of the form data:image"),
        ("data:image/png;base64," + base64.b64encode(b"SECRET").decode(), "data URI holds no picture"),
        (b"", "byte string holds no picture"),
        (b"SECRET" * 10, "byte string holds no picture"),
        (JPEG[:10], "truncated"),
        (JPEG[:200], "truncated"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (file_bytes(picture())[:100], "truncated"),
    ],
    ids=lambda value: repr(value[:40])[:60] if isinstance(value, (str, bytes)) else str(value),
)
def test_source_that_holds_no_picture_is_refused(source, match):
    assert_rejects([picture(), source], match)


@pytest.mark.parametrize("content", [b"SECRET, not a picture", b""], ids=["text", "empty"])
def test_file_that_holds_no_picture_is_refused_by_name_only(content, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    assert_rejects(str(path), "'cat.png' holds no picture")


def test_folder_is_refused(tmp_path):
    assert_rejects(tmp_path, "existing file")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "PPM"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_file_gives_a_picture_or_a_value_error(kind):
    data, random = file_bytes(picture(), kind), np.random.default_rng(0)
    processor = small_processor()
    for _ in range(100):
        damaged = bytearray(data[: random.integers(1, len(data) + 1)])
        for position in random.integers(0, min(len(damaged), 200), 3):
            damaged[position] = random.integers(0, 256)
        try:
            assert processor(bytes(damaged))["pixel_values"].shape == (1, 3, SIDE, SIDE)
        except ValueError as error:
            assert len(str(error)) < 400


def test_truncated_picture_opened_by_the_caller_is_refused(tmp_path):
    path = tmp_path / "half.jpg"
    path.write_bytes(JPEG[: len(JPEG) // 2])
    assert_rejects(Image.open(path), "truncated")


def test_closed_picture_is_refused(image_file):
    image = Image.open(image_file)
    image.close()
    assert_rejects(image, "closed")


# size and memory


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


def black_png(width, height):
    """A picture of one bit per pixel; its file is a ten-thousandth of it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


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


# options


def as_dict(data):
    return {name: np.asarray(value).tolist() for name, value in data.items()}


OWN_OPTIONS = {
    "image_mode": ("pad", {}),
    "min_tiles": (7, {"image_mode": "dynamic"}),
    "max_tiles": (2, {"image_mode": "dynamic"}),
    "s2_scales": ([SIDE, 2 * SIDE], {"image_mode": "dynamic_s2"}),
    "tile_multiple_images": (True, {"image_mode": "dynamic"}),
    "background_color": ([10, 20, 30], {}),
    "media_policy": ({"max_pixels": 1}, {}),
}
INHERITED_OPTIONS = {
    "size": ({"height": 8, "width": 8}, {}),
    "crop_size": ({"height": 8, "width": 8}, CLIP),
    "do_center_crop": (True, {"crop_size": 8}),
    "resample": (Image.Resampling.NEAREST, {"image_mode": "plain"}),
    "do_resize": (False, {}),
    "do_rescale": (False, {}),
    "rescale_factor": (0.25, {}),
    "do_normalize": (False, {}),
    "image_mean": ([0.1, 0.2, 0.3], {}),
    "image_std": ([0.1, 0.2, 0.3], {}),
}


def transparent_pair():
    return [Image.fromarray(noise(60, 35, channels=4)), Image.fromarray(noise(60, 35, channels=4))]


def test_every_option_of_our_own_is_tried():
    assert set(OWN_OPTIONS) == set(VilaImagesKwargs.__annotations__) - set(ImagesKwargs.__annotations__)


@pytest.mark.parametrize("name", sorted((OWN_OPTIONS | INHERITED_OPTIONS).keys() - {"media_policy"}))
def test_option_has_the_same_effect_at_call_time_as_in_the_constructor(name):
    value, others = (OWN_OPTIONS | INHERITED_OPTIONS)[name]
    images = transparent_pair() if name == "tile_multiple_images" else transparent_pair()[0]
    without = as_dict(small_processor(**others)(images))
    processor = small_processor(**others)
    at_call = as_dict(processor(images, **{name: value}))
    assert at_call != without
    assert as_dict(small_processor(**{**others, name: value})(images)) == at_call
    assert as_dict(processor(images)) == without


@pytest.mark.parametrize(("square", "size"), [(True, (8, 8)), (False, (8, 11))])
def test_size_of_one_number_is_a_square_by_default(square, size):
    data = small_processor()(picture(), image_mode="plain", size=8, default_to_square=square)
    assert data["pixel_values"].shape[2:] == size


@pytest.mark.parametrize(("kind", "container"), [("np", np.ndarray), ("pt", torch.Tensor), (None, np.ndarray)])
def test_tensors_are_of_the_kind_asked_for(kind, container):
    data = small_processor()(picture(), return_tensors=kind)
    assert all(isinstance(data[name], container) for name in ("pixel_values", "image_grid_thw"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_tiles": "12"}, "max_tiles"),
        ({"min_tiles": ...}, "min_tiles"),
        ({"background_color": 7}, "background_color"),
        ({"tile_multiple_images": "SECRET"}, "tile_multiple_images"),
        ({"media_policy": "SECRET"}, "media_policy"),
        ({"image_mode": "dynamic", "min_tiles": 0}, "min_tiles"),
        ({"image_mode": "dynamic", "max_tiles": -1}, "max_tiles"),
        ({"image_mode": "dynamic", "max_tiles": 10**9}, "max_tiles"),
        ({"image_mode": "dynamic_s2", "max_tiles": 8}, "max_tiles"),
        ({"image_mode": "dynamic_s2", "s2_scales": []}, "s2_scales"),
        ({"image_mode": "dynamic_s2", "s2_scales": [0, 8]}, "s2_scales"),
        ({"image_mode": "dynamic_s2", "s2_scales": [16, 8]}, "s2_scales"),
        ({"image_mode": "dynamic", "size": {"height": 8, "width": 9}}, "size"),
        ({"image_mode": "dynamic", "do_resize": False}, "do_resize"),
        ({"image_mode": "resize", "size": {"shortest_edge": 8}}, "size"),
        ({"image_mode": "plain", "size": {"longest_edge": 8}}, "size"),
        ({"image_mode": "plain", "size": {"shortest_edge": 8, "longest_edge": 9}}, "size"),
        ({"size": {"height": 0, "width": 8}}, "size"),
        ({"do_center_crop": True, "crop_size": {"height": -1, "width": 8}}, "crop_size"),
        ({"background_color": [1, 2]}, "background_color"),
        ({"background_color": [1, 2, 256]}, "background_color"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5], "image_mode": "pad"}, "image_std"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"image_mean": None, "do_normalize": False, "image_mode": "pad"}, "image_mean"),
        ({"data_format": "channels_last"}, "data_format"),
        ({"do_pad": True, "pad_size": 9}, "do_pad"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_bad_option_is_refused_by_name(options, match):
    assert_rejects(picture(), match, **options)


@pytest.mark.parametrize(
    "options",
    [{"max_tiles": "12"}, {"s2_scales": "448"}, {"image_mode": ["dynamic"]}, {"background_color": 7}],
    ids=str,
)
def test_an_option_of_the_wrong_type_in_a_file_is_refused_by_name(options, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=next(iter(options))):
        VilaImageProcessor.from_pretrained(tmp_path)


def test_unknown_image_mode_is_refused_by_name():
    with pytest.raises(ValueError, match="image_mode"):
        small_processor(image_mode="squeeze")(picture())


@pytest.mark.parametrize(
    "options",
    [{"image_mode": mode, "max_tiles": 11} for mode in IMAGE_MODES]
    + [{**CLIP, "image_mode": "plain"}, {"tile_multiple_images": True, "background_color": [1, 2, 3], "min_tiles": 2}],
    ids=str,
)
def test_saved_processor_is_the_same_processor(options, tmp_path):
    processor = small_processor(**options)
    processor.save_pretrained(tmp_path)
    images = transparent_pair()[0]
    for auto_class in (VilaImageProcessor, AutoImageProcessor):
        loaded = auto_class.from_pretrained(tmp_path)
        assert loaded.to_dict() == processor.to_dict()
        assert as_dict(loaded(images)) == as_dict(processor(images))


def test_a_url_is_fetched_and_its_failure_is_a_value_error(tmp_path):
    picture(31, 45).save(tmp_path / "picture.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, policy = f"http://127.0.0.1:{server.server_address[1]}", {"private_addresses": True}
        assert np.array_equal(seen(f"{address}/picture.png", media_policy=policy), seen(tmp_path / "picture.png"))
        with pytest.raises(ValueError, match="could not be fetched"):
            seen(f"{address}/missing.png", media_policy=policy)
        server.shutdown()
    with pytest.raises(ValueError, match="could not be fetched"):
        seen(f"{address}/picture.png", media_policy=policy)
