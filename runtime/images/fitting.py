"""Fitting images to the engine's size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.images.opening import ImageLike, open_image

FITS = ("stretch", "pad")
_PAD_VALUE = 128  # mid-grey: 0 after normalisation to [-1, 1]


@dataclass(frozen=True)
class FittedImage:
    """An image at the engine's input size.

    Attributes:
        pixels: uint8 [H, W, 3] at the engine's size.
        covered: the rows and columns of `pixels` that the image covers; the rest is padding.
        image_size: (H, W) of the original image in pixels.
    """

    pixels: np.ndarray
    covered: tuple[int, int]
    image_size: tuple[int, int]


def fit_image(
    image: Image.Image, size: tuple[int, int], fit: str = "stretch"
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize an image to the engine's size with Pillow's bicubic filter.

    Args:
        image: an RGB image.
        size: (H, W) in pixels.
        fit: "stretch" fills the size; "pad" keeps the aspect ratio and pads on the right and below.

    Returns:
        The pixels, uint8 [H, W, 3], and the numbers of rows and columns of them that the image covers.
    """
    height, width = size
    if fit == "stretch":
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), size
    if fit != "pad":
        raise InputError(f"unknown fit {fit!r}", f"choose one of {', '.join(FITS)}")
    scale = min(height / image.height, width / image.width)
    rows = min(height, max(1, round(image.height * scale)))
    columns = min(width, max(1, round(image.width * scale)))
    pixels = np.full((height, width, 3), _PAD_VALUE, np.uint8)
    pixels[:rows, :columns] = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC))
    return pixels, (rows, columns)


def fitted_image(source: ImageLike, size: tuple[int, int], fit: str = "stretch") -> FittedImage:
    """Open an image and fit it; see `open_image` and `fit_image`."""
    image = open_image(source)
    pixels, covered = fit_image(image, size, fit)
    return FittedImage(pixels, covered, (image.height, image.width))
