"""Pictures -> normalised tiles, bit for bit as the original does it with PIL.

- Always the PIL backend: NVILA was trained on PIL's bicubic, other resamplers shift the pixels.
- Pixels are a flat batch of equal tiles; the only tensor per picture is its grid.
- Rescaling and normalising 8-bit pixels is one table look-up, exactly equal to the arithmetic it replaces.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
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
)
from .image_loading_vila import array_to_image, load_image, open_image, to_rgb, upright_size
from .media_policy_vila import MediaPolicy
from .tiling_vila import center_crop, crop_square, cut_views, in_threads, pad_to_square, resize, tile_side

logger = logging.get_logger(__name__)

ImageMode = Literal["resize", "pad", "square", "dynamic", "dynamic_s2", "plain"]
IMAGE_MODES = ("resize", "pad", "square", "dynamic", "dynamic_s2", "plain")


class VilaImagesKwargs(ImagesKwargs, total=False):
    """
    image_mode: how a picture meets the square input of the tower. `"resize"` squeezes it, `"pad"` centres it on a
        square of the mean colour, `"square"` keeps its middle square or, of an upright picture, the top one,
        `"dynamic"` cuts tiles and appends a thumbnail, `"dynamic_s2"` cuts tiles at every scale, `"plain"` is the
        tower's own preprocessing.
    min_tiles, max_tiles: bounds on the grid of `"dynamic"`; `"dynamic_s2"` uses the upper one.
    s2_scales: sizes in pixels of the scales of `"dynamic_s2"`.
    tile_multiple_images: cut tiles also where a conversation has several pictures.
    background_color: `[red, green, blue]` that transparent pixels are laid on; None drops the alpha channel.
    media_policy: what may be read and how large it may be: a `MediaPolicy`, `"notebook"`, `"server"` or a dictionary
        of its fields to change.
    """

    image_mode: ImageMode
    min_tiles: int
    max_tiles: int
    s2_scales: list[int] | None
    tile_multiple_images: bool
    background_color: list[int] | tuple[int, ...] | None
    media_policy: Any


class VilaImageProcessor(PilBackend):
    """Cuts pictures into tiles and normalises them.

    Called with a list of pictures, it takes them as those of one conversation; with a list of lists, as one
    conversation each. Returns `pixel_values`, `(tiles of all pictures, 3, height, width)`, and `image_grid_thw`,
    `(pictures, 3)`, with `(1, rows, columns)` of each grid.

    The attribute `media_policy` says what is read; a value that is assigned changes it as `MediaPolicy.changed` says.
    It is not saved, and no file of a checkpoint sets it.
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
    do_center_crop = False
    crop_size: Any = None
    image_mode: ImageMode = "resize"
    min_tiles = 1
    max_tiles = 12
    s2_scales: list[int] | None = None
    tile_multiple_images = False
    background_color: list[int] | None = None

    def __init__(self, media_policy: Any = None, **kwargs: Any):
        super().__init__(**kwargs)
        own = VilaImagesKwargs.__annotations__.keys() - ImagesKwargs.__annotations__.keys()
        with errors_name_options():
            given = {name: value for name in own if (value := getattr(self, name)) is not None}
            validate_typed_dict(VilaImagesKwargs, given)  # type: ignore[type-var]
        # last: whatever a file of a checkpoint says, this is the caller's
        self._media_policy = MediaPolicy().changed(media_policy)

    @property
    def media_policy(self) -> MediaPolicy:
        return self.__dict__.get("_media_policy", MediaPolicy())

    @media_policy.setter
    def media_policy(self, change: Any) -> None:
        self._media_policy = self.media_policy.changed(change)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but without a media policy that a file of a checkpoint may hold."""
        options = {key: value for key, value in image_processor_dict.items() if "media_policy" not in key}
        return super().from_dict(options, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        with open(json_file, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "_media_policy"}

    def fetch_images(self, image_url_or_urls: Any, media_policy: Any = None) -> Any:
        """Reads the headers of URLs, paths, data URIs, base64 strings and bytes; pictures and arrays pass through."""
        policy = self.media_policy.changed(media_policy)
        if isinstance(image_url_or_urls, (list, tuple)):
            fetched = []
            for index, source in enumerate(image_url_or_urls):
                kind = "conversation" if isinstance(source, (list, tuple)) else "picture"
                with errors_name(f"{kind} {index}"):
                    fetched.append(self.fetch_images(source, policy))
            return fetched
        if isinstance(image_url_or_urls, (str, bytes, os.PathLike)):
            return open_image(image_url_or_urls, policy)
        return image_url_or_urls

    def tile_grids(self, sizes: Sequence[tuple[int, int]], **kwargs: Any) -> list[TileGrid]:
        """Grids of the pictures of one conversation from their `(height, width)` in pixels.

        Raises:
            ValueError: if `max_tiles` is below what `min_tiles` or the scales of dynamic S2 need.
        """
        return [self.tile_grid(size, len(sizes) > 1, **kwargs) for size in sizes]

    def tile_grid(self, picture_size: tuple[int, int], is_one_of_several: bool, **kwargs: Any) -> TileGrid:
        """Grid of one picture of a conversation, see `tile_grids`."""
        mode, min_tiles, max_tiles, scales, tile_multiple = (
            kwargs.get(name, getattr(self, name))
            for name in ("image_mode", "min_tiles", "max_tiles", "s2_scales", "tile_multiple_images")
        )
        if mode not in IMAGE_MODES:
            raise ValueError(f"unknown image_mode {mode!r}; known are {', '.join(IMAGE_MODES)}")
        if mode not in ("dynamic", "dynamic_s2"):
            return TileGrid(1, 1)
        if is_one_of_several and not tile_multiple:
            logger.warning_once(
                "A conversation has several pictures: each is shown as one view without tiles, as in the original "
                "inference. Pass `tile_multiple_images=True` to tile every picture at full detail."
            )
            return TileGrid(1, 1)
        tile_size = tile_side(kwargs.get("crop_size", self.crop_size) or kwargs.get("size", self.size))
        if mode == "dynamic_s2":
            if not scales:
                raise ValueError("image_mode 'dynamic_s2' needs s2_scales")
            min_tiles, tile_size = min_dynamic_s2_tiles(scales), scales[0]
            if max_tiles < min_tiles:
                raise ValueError(f"max_tiles={max_tiles} is below the {min_tiles} tiles that s2_scales={scales} need")
        return choose_tile_grid(*picture_size[::-1], tile_size, min_tiles, max_tiles)

    def picture_views(self, image: Any, is_one_of_several: bool, **kwargs: Any) -> tuple[list[Image.Image], TileGrid]:
        """One picture -> what the tower is shown of it, not normalised, and its grid.

        With `pixels_of_views` behind it, every picture can be decoded, cut and dropped before the next one.
        """
        return self._picture_views(image, is_one_of_several, **self._complete(kwargs))

    def frame_views(self, frame: Any, max_tiles: int = 1, **kwargs: Any) -> list[Image.Image]:
        """One video frame -> views as of `picture_views`: the whole frame or, with `max_tiles` above 1, tiles and a
        thumbnail.
        """
        kwargs = self._complete(kwargs)
        picture = self.process_image(frame, **kwargs)
        if max_tiles == 1:
            return self._cut(picture, TileGrid(1, 1), **kwargs)
        side = tile_side(kwargs["crop_size"] or kwargs["size"])
        grid = choose_tile_grid(picture.width, picture.height, side, 1, max_tiles)
        return self._cut(picture, grid, **{**kwargs, "image_mode": "dynamic"})

    def _complete(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options of one call with those of the processor behind them, checked."""
        own = {name: getattr(self, name, None) for name in self._valid_kwargs_names}
        kwargs = self._standardize_kwargs(**{**own, **kwargs})
        self._validate_preprocess_kwargs(**kwargs)
        return kwargs

    def _picture_views(self, image: Any, is_one_of_several: bool, **kwargs: Any) -> tuple[list[Image.Image], TileGrid]:
        picture = self.process_image(image, **kwargs)
        grid = self.tile_grid((picture.height, picture.width), is_one_of_several, **kwargs)
        return self._cut(picture, grid, **kwargs), grid

    def process_image(self, image: Any, background_color: Sequence[int] | None = None, **kwargs: Any) -> Image.Image:
        """Any accepted picture -> 8-bit RGB as a person sees it."""
        policy = self.media_policy.changed(kwargs.get("media_policy"))
        if hasattr(image, "to_image"):
            image = image.to_image(policy)
        elif not isinstance(image, Image.Image):
            height, width = upright_size(image)
            policy.check_pixels(width, height, "decoding the picture")
            image = array_to_image(image, kwargs.get("input_data_format"))
        load_image(image, "the picture", policy)
        return to_rgb(image, background_color)

    def _preprocess_image_like_inputs(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        policy = kwargs["media_policy"]
        conversations = group_by_conversation(images)
        policy.check_media(sum(map(len, conversations)))
        conversations = group_by_conversation(self.fetch_images(images, policy))
        tiles: list[Image.Image] = []
        grids: list[TileGrid] = []
        for row, conversation in enumerate(conversations):
            for index, image in enumerate(conversation):
                with errors_name(f"conversation {row}: picture {index}"):
                    views, grid = self._picture_views(image, len(conversation) > 1, **kwargs)
                tiles += views
                grids.append(grid)
        if not tiles:
            raise ValueError("no picture was given")
        return self._preprocess(tiles, grids, **kwargs)

    def preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:
        with errors_name_options():
            return super().preprocess(*args, **kwargs)

    def _standardize_kwargs(self, media_policy: Any = None, **kwargs: Any) -> dict:
        return {**super()._standardize_kwargs(**kwargs), "media_policy": self.media_policy.changed(media_policy)}

    def _validate_preprocess_kwargs(self, *args: Any, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(*args, **kwargs)
        mode, size, color = kwargs["image_mode"], kwargs["size"], kwargs["background_color"]
        if kwargs["do_pad"]:
            raise ValueError("do_pad is not supported: use image_mode='pad'")
        if getattr(kwargs["data_format"], "value", kwargs["data_format"]) not in (None, "channels_first"):
            raise ValueError("data_format must be 'channels_first', which is what the vision tower takes")
        if kwargs["do_resize"]:
            check_size("size", size, {"height", "width"}, {"shortest_edge"})
        if kwargs["do_center_crop"]:
            check_size("crop_size", kwargs["crop_size"], {"height", "width"})
        if mode == "resize" and kwargs["do_resize"] and not (kwargs["crop_size"] or size.height):
            raise ValueError("image_mode 'resize' needs a size with height and width")
        if mode in ("dynamic", "dynamic_s2") and not kwargs["do_resize"]:
            raise ValueError(f"image_mode {mode!r} needs do_resize=True")
        if color is not None and (len(color) != 3 or not all(0 <= channel <= 255 for channel in color)):
            raise ValueError("background_color must be three numbers of 0 to 255")
        for name in ("image_mean", "image_std"):
            if np.size(kwargs[name]) not in (1, 3):
                raise ValueError(f"{name} must be one number or three")
        if mode == "pad" and kwargs["image_mean"] is None:
            raise ValueError("image_mode 'pad' needs image_mean, the colour it pads with")

    def _cut(self, picture: Image.Image, grid: TileGrid, **kwargs: Any) -> list[Image.Image]:
        """One RGB picture -> its tiles, not normalised (specs of the release: NVILA §3.1)."""
        mode, policy, target = kwargs["image_mode"], kwargs["media_policy"], kwargs["crop_size"] or kwargs["size"]
        if grid.area > 1 and mode == "dynamic":
            tiles = cut_views(picture, [grid, TileGrid(1, 1)], tile_side(target), policy)
            return [self._tower_preprocessing(tile, **kwargs) for tile in tiles]
        if grid.area > 1:
            squares = [TileGrid(k, k) for k in scale_splits(kwargs["s2_scales"])[:-1]]
            return cut_views(picture, [*squares, grid], kwargs["s2_scales"][0], policy)
        if mode == "resize" and kwargs["do_resize"]:
            picture = resize(picture, target["width"], target["height"], policy)
        elif mode == "pad":
            picture = pad_to_square(picture, kwargs["image_mean"], policy)
        elif mode == "square":
            picture = crop_square(picture)
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
            picture = resize(picture, width, height, kwargs["media_policy"], kwargs["resample"])
        if kwargs["do_center_crop"]:
            picture = center_crop(picture, kwargs["crop_size"], kwargs["media_policy"])
        return picture

    def pixels_of_views(self, views: list[Image.Image], **kwargs: Any) -> np.ndarray:
        """Views of `picture_views` and `frame_views` -> `(views, 3, height, width)`, normalised.

        Raises:
            ValueError: if they differ in size.
        """
        return self._normalise(views, **self._complete(kwargs))

    def _preprocess(self, images: list[Image.Image], grids: list[TileGrid], **kwargs: Any) -> BatchFeature:
        data = {
            "pixel_values": self._normalise(images, **kwargs),
            "image_grid_thw": np.array([(1, grid.rows, grid.cols) for grid in grids], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=kwargs["return_tensors"])

    def _normalise(self, views: list[Image.Image], **kwargs: Any) -> np.ndarray:
        table = normalisation_table(**kwargs)
        height, width = views[0].height, views[0].width
        if any((view.height, view.width) != (height, width) for view in views):
            raise ValueError("pictures of different sizes cannot be batched: `do_resize=False` needs equal sizes")
        pixel_values = np.empty((len(views), 3, height, width), dtype=np.float32)

        def normalise(number: int) -> None:
            pixels = np.asarray(views[number])
            for channel in range(3):
                # no index of 8 bits is outside of the table: clipping saves the check
                np.take(table[channel], pixels[..., channel], out=pixel_values[number, channel], mode="clip")

        in_threads(normalise, range(len(views)))
        return pixel_values


def normalisation_table(
    do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean: Any, image_std: Any, **kwargs: Any
) -> np.ndarray:
    """`(3, 256)` float32: what rescaling and normalising makes of every 8-bit value of every channel."""
    table = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[:, None]
    if do_rescale:
        table = rescale(table, rescale_factor, input_data_format="channels_first")
    if do_normalize:
        table = normalize(table.astype(np.float32), image_mean, image_std, input_data_format="channels_first")
    if not np.isfinite(table).all():
        raise ValueError("image_mean, image_std and rescale_factor must be finite and image_std not zero")
    return table[:, 0].astype(np.float32)


@contextmanager
def errors_name(item: str) -> Iterator[None]:
    """Puts the item of a batch in front of the messages of errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{item}: {error}") from error


@contextmanager
def errors_name_options() -> Iterator[None]:
    """Turns transformers' errors about the type of an option, which show its value, into a `ValueError`."""
    try:
        yield
    except StrictDataclassError as error:
        # up to where the value is shown
        raise ValueError(re.split(r", got | \(value", str(error))[0]) from None


def check_size(name: str, size: SizeDict, *allowed: set[str]) -> None:
    if set(dict(size)) not in allowed or min(dict(size).values()) < 1:
        keys = " or ".join("{" + ", ".join(sorted(keys)) + "}" for keys in allowed)
        raise ValueError(f"{name} must be {keys} of at least one pixel")


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


__all__ = ["VilaImageProcessor"]
