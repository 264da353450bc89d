"""Pictures -> normalised tiles, bit for bit as the original does it with PIL.

- Always the PIL backend: NVILA was trained on PIL's bicubic, other resamplers shift the pixels.
- Pixels are a flat batch of equal tiles; the only tensor per picture is its grid.
- Rescaling and normalising 8-bit pixels is one table look-up, exactly equal to the arithmetic it replaces.
"""

import base64
import binascii
import os
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
from huggingface_hub import get_session
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_resize_output_image_size, normalize, rescale
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .geometry_vila import (
    TileGrid,
    choose_tile_grid,
    min_dynamic_s2_tiles,
    scale_splits,
    square_padding,
    tile_boxes,
)

logger = logging.get_logger(__name__)

ImageMode = Literal["resize", "pad", "dynamic", "dynamic_s2", "plain"]
IMAGE_MODES = ("resize", "pad", "dynamic", "dynamic_s2", "plain")
URL_TIMEOUT_SECONDS = 30.0
MAX_RESIZED_PIXELS = 1 << 26


class VilaImagesKwargs(ImagesKwargs, total=False):
    """
    image_mode: how a picture meets the square input of the tower. `"resize"` squeezes it, `"pad"` centres it on a
        square of the mean colour, `"dynamic"` cuts tiles and appends a thumbnail, `"dynamic_s2"` cuts tiles at every
        scale, `"plain"` is the tower's own preprocessing.
    min_tiles, max_tiles: bounds on the grid of `"dynamic"`; `"dynamic_s2"` uses the upper one.
    s2_scales: sizes in pixels of the scales of `"dynamic_s2"`.
    tile_multiple_images: cut tiles also where a conversation has several pictures.
    background_color: `[red, green, blue]` that transparent pixels are laid on; None drops the alpha channel.
    """

    image_mode: ImageMode
    min_tiles: int
    max_tiles: int
    s2_scales: list[int] | None
    tile_multiple_images: bool
    background_color: list[int] | tuple[int, ...] | None


class VilaImageProcessor(PilBackend):
    """Cuts pictures into tiles and normalises them.

    Called with a list of pictures, it takes them as those of one conversation; with a list of lists, as one
    conversation each. Returns `pixel_values`, `(tiles of all pictures, 3, height, width)`, and `image_grid_thw`,
    `(pictures, 3)`, with `(1, rows, columns)` of each grid.
    """

    valid_kwargs = VilaImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 448, "width": 448}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    image_mode: ImageMode = "resize"
    min_tiles = 1
    max_tiles = 12
    s2_scales: list[int] | None = None
    tile_multiple_images = False
    background_color: list[int] | None = None

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens URLs, paths, data URIs, base64 strings and bytes; pictures and arrays pass through."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(source) for source in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, bytes, os.PathLike)):
            return open_image(image_url_or_urls)
        return image_url_or_urls

    def tile_grids(self, sizes: Sequence[tuple[int, int]], **kwargs: Any) -> list[TileGrid]:
        """Grids of the pictures of one conversation from their `(height, width)` in pixels.

        Raises:
            ValueError: if `max_tiles` is below what `min_tiles` or the scales of dynamic S2 need.
        """
        mode, min_tiles, max_tiles, scales, tile_multiple, size = (
            kwargs.get(name, getattr(self, name))
            for name in ("image_mode", "min_tiles", "max_tiles", "s2_scales", "tile_multiple_images", "size")
        )
        if mode not in IMAGE_MODES:
            raise ValueError(f"unknown image_mode {mode!r}; known are {', '.join(IMAGE_MODES)}")
        if mode not in ("dynamic", "dynamic_s2"):
            return [TileGrid(1, 1)] * len(sizes)
        if len(sizes) > 1 and not tile_multiple:
            logger.warning_once(
                f"A conversation has {len(sizes)} pictures: each is shown as one view without tiles, as in the original "
                "inference. Pass `tile_multiple_images=True` to tile every picture at full detail."
            )
            return [TileGrid(1, 1)] * len(sizes)
        tile_size = tile_side(size)
        if mode == "dynamic_s2":
            if not scales:
                raise ValueError("image_mode 'dynamic_s2' needs s2_scales")
            min_tiles, tile_size = min_dynamic_s2_tiles(scales), scales[0]
            if max_tiles < min_tiles:
                raise ValueError(f"max_tiles={max_tiles} is below the {min_tiles} tiles that s2_scales={scales} need")
        return [choose_tile_grid(width, height, tile_size, min_tiles, max_tiles) for height, width in sizes]

    def process_image(self, image: Any, background_color: Sequence[int] | None = None, **kwargs: Any) -> Image.Image:
        """Any accepted picture -> 8-bit RGB as a person sees it."""
        if not isinstance(image, Image.Image):
            image = array_to_image(image, kwargs.get("input_data_format"))
        return to_rgb(image, background_color)

    def _preprocess_image_like_inputs(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        conversations = group_by_conversation(self.fetch_images(images))
        tiles: list[Image.Image] = []
        grids: list[TileGrid] = []
        for conversation in conversations:
            pictures = [self.process_image(image, **kwargs) for image in conversation]
            chosen = self.tile_grids([(picture.height, picture.width) for picture in pictures], **kwargs)
            for picture, grid in zip(pictures, chosen):
                tiles += self._cut(picture, grid, **kwargs)
            grids += chosen
        if not tiles:
            raise ValueError("no picture was given")
        return self._preprocess(tiles, grids, **kwargs)

    def _cut(self, picture: Image.Image, grid: TileGrid, **kwargs: Any) -> list[Image.Image]:
        """One RGB picture -> its tiles, not normalised (specs of the release: NVILA §3.1)."""
        mode, size, crop_size = kwargs["image_mode"], kwargs["size"], kwargs["crop_size"]
        if grid.area > 1 and mode == "dynamic":
            side = tile_side(size)
            tiles = cut_tiles(picture, grid, side)
            return tiles + [picture.resize((side, side), Image.Resampling.BICUBIC)]
        if grid.area > 1:
            squares = [TileGrid(k, k) for k in scale_splits(kwargs["s2_scales"])[:-1]]
            side = kwargs["s2_scales"][0]
            return [tile for split in [*squares, grid] for tile in cut_tiles(picture, split, side)]
        if mode == "resize":
            target = crop_size if kwargs["do_center_crop"] else size
            picture = picture.resize((target["width"], target["height"]), Image.Resampling.BICUBIC)
        elif mode == "pad":
            picture = pad_to_square(picture, kwargs["image_mean"])
        return [self._tower_preprocessing(picture, **kwargs)]

    def _tower_preprocessing(self, picture: Image.Image, **kwargs: Any) -> Image.Image:
        """Resize and centre crop as the tower's own image processor does."""
        size: SizeDict = kwargs["size"]
        if kwargs["do_resize"]:
            if size.shortest_edge:
                height, width = get_resize_output_image_size(
                    np.empty((3, picture.height, picture.width), dtype=np.uint8),
                    size.shortest_edge,
                    default_to_square=False,
                    input_data_format="channels_first",
                )
            else:
                height, width = size.height, size.width
            if width * height > MAX_RESIZED_PIXELS:
                raise ValueError(
                    f"a picture of {picture.width}x{picture.height} pixels is too narrow for image_mode "
                    f"{kwargs['image_mode']!r}: it would be enlarged to {width}x{height}"
                )
            picture = picture.resize((width, height), kwargs["resample"])
        if kwargs["do_center_crop"]:
            picture = center_crop(picture, kwargs["crop_size"])
        return picture

    def _preprocess(self, images: list[Image.Image], grids: list[TileGrid], **kwargs: Any) -> BatchFeature:
        if kwargs.get("do_pad"):
            raise ValueError("do_pad is not supported: use image_mode='pad'")
        table = normalisation_table(**kwargs)
        height, width = images[0].height, images[0].width
        pixel_values = np.empty((len(images), 3, height, width), dtype=np.float32)
        for tile, picture in zip(pixel_values, images):
            if (picture.height, picture.width) != (height, width):
                raise ValueError("pictures of different sizes cannot be batched: `do_resize=False` needs equal sizes")
            pixels = np.asarray(picture)
            for channel in range(3):
                np.take(table[channel], pixels[..., channel], out=tile[channel])
        data = {
            "pixel_values": pixel_values,
            "image_grid_thw": np.array([(1, grid.rows, grid.cols) for grid in grids], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=kwargs["return_tensors"])


def normalisation_table(
    do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean: Any, image_std: Any, **kwargs: Any
) -> np.ndarray:
    """`(3, 256)` float32: what rescaling and normalising makes of every 8-bit value of every channel."""
    table = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[:, None]
    if do_rescale:
        table = rescale(table, rescale_factor, input_data_format="channels_first")
    if do_normalize:
        table = normalize(table.astype(np.float32), image_mean, image_std, input_data_format="channels_first")
    return table[:, 0].astype(np.float32)


def tile_side(size: SizeDict | dict[str, int]) -> int:
    """Side of the square tile; tiling needs one."""
    if size.get("height") != size.get("width") or not size.get("height"):
        raise ValueError(f"tiles are square: size needs equal height and width, got {dict(size)}")
    return size["height"]


def cut_tiles(picture: Image.Image, grid: TileGrid, side: int) -> list[Image.Image]:
    resized = picture.resize((side * grid.cols, side * grid.rows), Image.Resampling.BICUBIC)
    return [resized.crop(box) for box in tile_boxes(grid, side)]


def pad_to_square(picture: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The picture centred on a square of the mean colour."""
    side, left, upper = square_padding(picture.width, picture.height)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(picture, (left, upper))
    return square


def center_crop(picture: Image.Image, crop_size: SizeDict) -> Image.Image:
    """The middle of the picture; black where the picture is smaller than the crop."""
    left = (picture.width - crop_size.width) // 2
    upper = (picture.height - crop_size.height) // 2
    return picture.crop((left, upper, left + crop_size.width, upper + crop_size.height))


def group_by_conversation(images: Any) -> list[list[Any]]:
    """One picture, a list of pictures or a list of lists -> a list of conversations."""
    if not isinstance(images, (list, tuple)):
        images = [images]
    nested = [isinstance(entry, (list, tuple)) for entry in images]
    if all(nested):
        return [list(conversation) for conversation in images]
    if any(nested):
        raise ValueError("images mixes pictures and lists of pictures")
    return [list(images)]


def open_image(source: str | bytes | os.PathLike) -> Image.Image:
    """Opens a picture from an http(s) URL, a path, a data URI, a base64 string or the bytes of a file.

    Raises:
        ValueError: if the source is none of these or does not hold a picture.
    """
    if isinstance(source, bytes):
        return decode_image(source, "the given bytes")
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        response = get_session().get(text, timeout=URL_TIMEOUT_SECONDS, follow_redirects=True)
        response.raise_for_status()
        return decode_image(response.content, "the given URL")
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        if not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ValueError("a data URI must be of the form data:image/<type>;base64,<data>")
        return decode_image(decode_base64(payload), "the given data URI")
    if len(text) < 4096 and os.path.isfile(text):
        with open(text, "rb") as file:
            return decode_image(file.read(), f"the file {os.path.basename(text)!r}")
    try:
        data = decode_base64(text)
    except ValueError as error:
        shown = text if len(text) <= 200 else text[:200] + "..."
        raise ValueError(f"not an http(s) URL, an existing file or a base64 string: {shown!r}") from error
    return decode_image(data, "the given base64 string")


def decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not valid base64") from error


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes the whole picture now, so that a truncated file fails here and not in the middle of a batch."""
    try:
        image = Image.open(BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} holds no picture that Pillow can read") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} holds a broken or truncated picture") from error
    return image


def to_rgb(image: Image.Image, background_color: Sequence[int] | None = None) -> Image.Image:
    """8-bit RGB, turned as its EXIF orientation says.

    16-bit and float pictures are scaled to 8 bits (PIL would clip them to white). Transparency is laid on
    `background_color`, or dropped, as in the original, if that is None.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = array_to_image(np.asarray(image))
    if image.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA" and background_color is not None:
        canvas = Image.new("RGBA", image.size, (*background_color, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def array_to_image(array: Any, input_data_format: Any = None) -> Image.Image:
    """Array or tensor, `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels -> 8-bit picture.

    Floats are taken as 0-1 if all lie in that range, else as 0-255; wider integers as 16-bit if a value exceeds 255.
    """
    pixels = np.asarray(array)
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
    elif np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all():
            raise ValueError("a picture must not hold NaN or infinite values")
        scale = 255.0 if pixels.min() >= 0 and pixels.max() <= 1 else 1.0
        pixels = np.clip(np.rint(pixels * scale), 0, 255)
    elif pixels.dtype != np.uint8:
        if not np.issubdtype(pixels.dtype, np.integer):
            raise ValueError(f"a picture must hold numbers, got dtype {pixels.dtype}")
        pixels = np.clip(pixels, 0, 65535) // (257 if pixels.max() > 255 else 1)
    pixels = np.ascontiguousarray(pixels.astype(np.uint8))
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


__all__ = ["VilaImageProcessor"]
