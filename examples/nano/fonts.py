"""Fonts that come with pip packages: the one in Pillow, and those that matplotlib brings in its wheel.

All glyphs are laid out by FreeType alone, so that a picture is the same whether or not libraqm is installed.
"""

import importlib.util
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
)
PILLOW_FONT = "Aileron"
NAMES = (*FILES, PILLOW_FONT)


@lru_cache(maxsize=1)
def folder() -> Path:
    """matplotlib's fonts; matplotlib itself is not imported, which takes a second.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    found = importlib.util.find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("the fonts come with matplotlib: pip install 'vila-hf[nano]'")
    return Path(found.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of `NAMES` at `size` pixels."""
    if name == PILLOW_FONT:
        return ImageFont.load_default(size)  # type: ignore[return-value]
    return ImageFont.truetype(str(folder() / name), size, layout_engine=ImageFont.Layout.BASIC)
