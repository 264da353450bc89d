"""Pictures for the bare PS3 encoder, resized in the mode that they come in, as the original does it with PIL."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps

from .image_loading_vila import load_image
from .image_processing_vila import VilaImageProcessor
from .tiling_vila import resize

# what PIL resizes in another way than RGB: palettes by the nearest pixel, transparency weighed by itself
OWN_MODES = ("1", "P", "PA", "L", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")


class Ps3ImageProcessor(VilaImageProcessor):
    """`VilaImageProcessor`, but a picture becomes RGB behind the resize, not in front of it.

    VILA-HD converts first, and has a `VilaImageProcessor`.
    """

    def process_image(self, image: Any, background_color: Sequence[int] | None = None, **kwargs: Any) -> Image.Image:
        policy, size = self.media_policy.changed(kwargs.get("media_policy")), kwargs.get("size")
        if hasattr(image, "to_image"):
            image = image.to_image(policy)
        is_own = isinstance(image, Image.Image) and image.mode in OWN_MODES and background_color is None
        if is_own and kwargs.get("do_resize") and size is not None and size.height:
            load_image(image, "the picture", policy)
            image = ImageOps.exif_transpose(image)
            image = resize(image, size.width, size.height, policy, kwargs["resample"])
        return super().process_image(image, background_color, **kwargs)


__all__ = ["Ps3ImageProcessor"]
