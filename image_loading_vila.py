"""Whatever a picture comes as -> 8-bit RGB as a person sees it, with limits that are checked before the work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .media_sources_vila import open_source, read_bytes

EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height


@dataclass(frozen=True)
class EncodedPicture:
    """The file of a picture of which only the header was read.

    It is decoded when its turn comes, and then not kept: of many pictures, one at a time is in memory.
    """

    data: bytes
    name: str
    width: int
    height: int

    def to_image(self, policy: Any) -> Image.Image:
        """Decodes the whole picture, so that a truncated file fails here.

        Raises:
            ValueError: if it is broken.
        """
        image = Image.open(BytesIO(self.data))
        load_image(image, self.name, policy)
        return image


def open_image(source: str | bytes | os.PathLike, policy: Any) -> EncodedPicture:
    """A picture from an http(s) URL, a path, a data URI, a base64 string or the bytes of a file; not decoded yet.

    Raises:
        ValueError: if the source is none of these, does not hold a picture, or the policy refuses it.
    """
    found = open_source(source, "image", policy)
    data, name = read_bytes(found, policy), found.name
    try:
        image = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} holds no picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} holds a picture of more pixels than Pillow opens; the limit max_pixels is {policy.max_pixels}"
        ) from error
    except Exception as error:  # broken headers reach Pillow's parsers and raise nearly anything
        raise ValueError(f"{name} holds a broken or truncated picture") from error
    policy.check_pixels(image.width, image.height, f"decoding {name}")
    height, width = upright_size(image)
    return EncodedPicture(data, name, width, height)


def upright_size(image: Any) -> tuple[int, int]:
    """`(height, width)` of a picture of any accepted kind without decoding it, as far as its header tells."""
    if isinstance(image, Image.Image):
        try:
            # Pillow decodes a PNG to find EXIF data behind its pixels
            is_known = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(EXIF_ORIENTATION) if is_known else None
        except Exception:  # as in `open_image`
            orientation = None
        return (image.width, image.height) if orientation in TURNED else (image.height, image.width)
    if hasattr(image, "height") and hasattr(image, "width"):
        return image.height, image.width
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) not in (2, 3) or 0 in shape:
        return 1, 1  # no picture: what is done with it says so
    return shape[:2] if len(shape) == 2 or shape[-1] in (1, 3, 4) else shape[1:]


def load_image(image: Image.Image, name: str, policy: Any) -> None:
    """Decodes a picture of which only the header was read, unless the header says that it is too large."""
    policy.check_pixels(image.width, image.height, f"decoding {name}")
    try:
        image.load()
    except Exception as error:  # as in `open_image`
        raise ValueError(f"{name} is broken, truncated or closed") from error


def to_rgb(image: Image.Image, background_color: Sequence[int] | None = None) -> Image.Image:
    """8-bit RGB, turned as its EXIF orientation says.

    16-bit and float pictures are scaled to 8 bits (PIL would clip them to white). Transparency is laid on
    `background_color`, or dropped, as in the original, if that is None.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = array_to_image(np.asarray(image))
    if image.mode == "La":  # premultiplied grey, which Pillow converts to nothing else
        image = image.convert("LA")
    if image.mode in ("P", "PA", "LA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA" and background_color is not None:
        canvas = Image.new("RGBA", image.size, (*background_color, 255))
        image = Image.alpha_composite(canvas, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def array_to_image(array: Any, input_data_format: Any = None) -> Image.Image:
    """Array or tensor, `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels -> 8-bit picture.

    Floats are taken as 0-1 if all lie in that range, else as 0-255; `uint16` as 16-bit, and so are other integers if a
    value exceeds 255.

    Raises:
        ValueError: if it is no array of numbers, has another shape, or holds NaN or values out of range.
    """
    if hasattr(array, "is_floating_point"):  # a tensor; numpy lacks bfloat16
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    pixels = np.asarray(array)
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"a picture must be an image or an array of numbers, got {type(array).__name__}")
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        raise ValueError(f"a picture must have 2 or 3 non-empty dimensions, got shape {pixels.shape}")
    if pixels.ndim == 3:
        first = pixels.shape[0] in (1, 3, 4) and pixels.shape[-1] not in (1, 3, 4)
        ambiguous = pixels.shape[0] in (1, 3, 4) and pixels.shape[-1] in (1, 3, 4)
        layout = getattr(input_data_format, "value", input_data_format)
        if layout == "channels_first" or (layout is None and (first or (ambiguous and pixels.shape[-1] != 3))):
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.shape[-1] not in (1, 3, 4):
            raise ValueError(f"a picture must have 1, 3 or 4 channels, got shape {np.shape(array)}")
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f":
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 255):  # written so that NaN fails
            raise ValueError("a picture of floats must hold 0 to 1 or 0 to 255, and no NaN")
        pixels = np.rint(pixels * (255.0 if high <= 1 else 1.0))
    elif pixels.dtype == np.uint16:
        pixels = pixels // 257
    elif pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("a picture of integers must hold 0 to 255 or 0 to 65535")
        pixels = pixels // (257 if pixels.max() > 255 else 1)
    pixels = np.ascontiguousarray(pixels.astype(np.uint8))
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
