"""Reading images of any kind, and fitting them to the engine's size as RGB uint8."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import open_regular

ImageLike = Union[str, "os.PathLike[str]", Image.Image, np.ndarray]

FITS = ("stretch", "pad")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
LARGEST_FILE = 1 << 29
"""The most bytes that an image file may have. Files within Pillow's limit of pixels are smaller."""
_PROGRAMS = frozenset({"EPS"})  # Pillow starts Ghostscript for these, which runs what the file says
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


def open_image(source: ImageLike) -> Image.Image:
    """Open an image as RGB with 8 bits per channel.

    EXIF rotation is applied, transparency is laid over white, and 16-bit grey is scaled to 8 bits.

    Args:
        source: a path, a PIL image, or an RGB uint8 array [H, W, 3].

    Raises:
        InputError: the file is missing, truncated, not an image or too large to decode safely, or the array
            has another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if not isinstance(source, (str, os.PathLike, Image.Image)):
        raise InputError(f"an image is a path, a PIL image or an array, not {type(source).__name__}")
    if isinstance(source, Image.Image):
        with _told("the image"):
            return _to_rgb(source, "the image")
    name = str(source)
    with _told(name), open_regular(os.fspath(source), LARGEST_FILE) as file, decoding(file) as image:
        return _to_rgb(image, name)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file; see `open_image`.

    Args:
        name: the file's name, for messages.

    Raises:
        InputError: the content is truncated, not an image, or too large to decode safely.
    """
    with _told(name), decoding(io.BytesIO(content)) as image:
        return _to_rgb(image, name)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what Pillow and the system raise about an image into an InputError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such image") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a directory, not an image") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{name} has more than {limit:,} pixels", "scale it down first") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(
            f"{name} is not a readable image ({_one_line(error)})", "re-encode it as PNG or JPEG"
        ) from error


@contextmanager
def decoding(file: BinaryIO) -> Iterator[Image.Image]:
    """Open a picture with Pillow. Its pixels are decoded when they are first used.

    Raises:
        UnidentifiedImageError: Pillow does not know the format, or needs another program to read it.
    """
    with warnings.catch_warnings():
        # Pillow warns between one and two times its limit and raises beyond; the former are accepted.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            if image.format in _PROGRAMS:
                raise UnidentifiedImageError(f"{image.format} is a program, not a picture")
            yield image


def picture_count(path: Path) -> int:
    """The number of pictures in an image file: more than 1 in an animation, and 1 if it cannot be read."""
    try:
        with open_regular(path, LARGEST_FILE) as file, decoding(file) as image:
            return int(getattr(image, "n_frames", 1))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return 1


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name.

    Raises:
        InputError: `folder` is not a folder, or holds no images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory of images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"{folder} holds no images", f"it needs one of {', '.join(sorted(SUFFIXES))}")
    return paths


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder and of all folders below it, sorted.

    Raises:
        InputError: there are no images.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"{folder} holds no images", f"it needs one of {', '.join(sorted(SUFFIXES))}")
    return paths


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


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise InputError(f"an image array must be RGB uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array), "RGB")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name} is empty: {image.width}x{image.height} pixels")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(f"{name} has values outside 16 bits", "convert it to 8 bits")
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8), "L")
    elif image.mode == "F":
        raise InputError(f"{name} is a float image of unknown range", "convert it to 8 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _one_line(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError) and "identify" in str(error):
        return "no kind of image that Pillow reads"  # Pillow's own text holds the file object's address
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).split("\n")[0][:120] or type(error).__name__
