"""The canvas that every picture shares: fitted images in a row, a colour scale and its legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 12  # px between two images

_HEIGHT = 640  # largest height of an image in a picture, px
_LEGEND = (190, 30)  # px
_SCALE = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float32
)  # viridis at 0, 1/4, ... 1; its lightness rises evenly


def fit(image: Image.Image) -> Image.Image:
    """Scale an image down to the largest size that a picture holds; a smaller one keeps its size."""
    return image.resize(fitted_size(image.size), Image.Resampling.LANCZOS)


def fitted_size(size: Sequence[int]) -> tuple[int, int]:
    """The (width, height) that `fit` gives to an image of (width, height)."""
    width, height = size
    scale = min(1.0, _HEIGHT / height, 2 * _HEIGHT / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Put images in a row on white, aligned at the top."""
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + GAP
    return canvas


def scale_colours(values: np.ndarray) -> np.ndarray:
    """Map numbers in 0..1 to colours from dark violet to yellow, uint8 [..., 3]."""
    position = np.clip(values, 0.0, 1.0) * (len(_SCALE) - 1)
    lower = np.minimum(position.astype(np.int64), len(_SCALE) - 2)
    weight = (position - lower)[..., None].astype(np.float32)
    colours: np.ndarray = np.rint(_SCALE[lower] * (1 - weight) + _SCALE[lower + 1] * weight).astype(np.uint8)
    return colours


def draw_scale(picture: Image.Image, what: str, low: float, high: float) -> None:
    """Draw the colour scale into the lower left corner. A picture too small for it is left as it is."""
    width, height = _LEGEND
    if picture.width < width + 12 or picture.height < 3 * height:
        return
    left, top = 6, picture.height - height - 6
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + width, top + height), fill="white")
    bar = scale_colours(np.linspace(0, 1, width - 12)[None].repeat(9, axis=0))
    picture.paste(Image.fromarray(bar), (left + 6, top + height - 13))
    font = ImageFont.load_default(11)
    draw.text((left + 6, top + 2), f"{low:.2f}", "black", font, "la")
    draw.text((left + width // 2, top + 2), what, "black", font, "ma")
    draw.text((left + width - 6, top + 2), f"{high:.2f}", "black", font, "ra")
