"""Pictures, what their processor makes of them, and how it refuses them."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vila import VilaImageProcessor

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


def black_png(width, height, channels=1):
    """A picture of one bit per pixel, or of three bytes; its file is a thousandth of that."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row_bytes, depth, color = ((width + 7) // 8, 1, 0) if channels == 1 else (3 * width, 8, 2)
    rows = zlib.compress(bytes(row_bytes + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
