"""Whatever a picture comes as -> 8-bit RGB as a person sees it, with limits that are checked before the work."""

import base64
import binascii
import os
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError

URL_TIMEOUT_SECONDS = 30.0
MAX_PIXELS = 2**27  # of a picture as it is given, resized or padded; Pillow warns from about 2/3 of this on


def check_pixels(width: int, height: int, purpose: str, max_pixels: int = MAX_PIXELS) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{purpose} takes {width}x{height} pixels, more than the limit max_pixels={max_pixels}: pass a smaller "
            "picture or raise the limit"
        )


def open_image(source: str | bytes | os.PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens a picture from an http(s) URL, a path, a data URI, a base64 string or the bytes of a file.

    Raises:
        ValueError: if the source is none of these or does not hold a picture.
    """
    if isinstance(source, bytes):
        return decode_image(source, "the given byte string", max_pixels)
    text = os.fsdecode(source)
    if text.startswith(("http://", "https://")):
        return decode_image(fetch_url(text), "the given URL", max_pixels)
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        if not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ValueError("a data URI must be of the form data:image/<type>;base64,<data>")
        return decode_image(decode_base64(payload), "the given data URI", max_pixels)
    if len(text) < 4096 and os.path.isfile(text):
        try:
            with open(text, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ValueError(f"the file {os.path.basename(text)!r} cannot be read") from error
        return decode_image(data, f"the file {os.path.basename(text)!r}", max_pixels)
    # only what has the suffix of a file name is shown: the rest may be somebody's base64 data
    if isinstance(source, os.PathLike) or (len(text) <= 200 and os.path.splitext(text)[1]):
        raise ValueError(f"not an http(s) URL or an existing file: {text[:200]!r}")
    try:
        data = decode_base64(text)
    except ValueError as error:
        raise ValueError("not an http(s) URL, an existing file, a data URI or a base64 string") from error
    return decode_image(data, "the given base64 string", max_pixels)


def fetch_url(url: str) -> bytes:
    """What an http(s) URL answers.

    Raises:
        ValueError: if it cannot be reached or answers with an error.
    """
    try:
        response = httpx.get(url, timeout=URL_TIMEOUT_SECONDS, follow_redirects=True)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ValueError(f"the given URL could not be fetched ({type(error).__name__})") from error
    return response.content


def decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not valid base64") from error


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the whole picture now, so that a truncated file fails here and not in the middle of a batch."""
    try:
        image = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} holds no picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} holds a picture of more pixels than Pillow opens; the limit max_pixels is {max_pixels}"
        ) from error
    except Exception as error:  # broken headers reach Pillow's parsers and raise nearly anything
        raise ValueError(f"{name} holds a broken or truncated picture") from error
    load_image(image, name, max_pixels)
    return image


def load_image(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Decodes a picture of which only the header was read, unless the header says that it is too large."""
    check_pixels(image.width, image.height, f"decoding {name}", max_pixels)
    try:
        image.load()
    except Exception as error:  # as in `decode_image`
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
    return image.convert("RGB")


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
