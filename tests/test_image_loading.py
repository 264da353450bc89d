"""Pictures of every kind and source: what colours they have, and which are refused."""

import base64
import functools
import http.server
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_inputs import SIDE, assert_rejects, file_bytes, noise, picture, pixels_of, seen, small_processor
from PIL import Image

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
