"""Opening images as RGB. The rules are in this package's docstring."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Union

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ditf.runtime.errors import DitfError, InputError
from ditf.runtime.files.reading import open_regular
from ditf.runtime.images.bit_depth import stored_samples, to_8_bits
from ditf.runtime.images.pages import check_single, pictures_in

ImageLike = Union[str, "os.PathLike[str]", Image.Image, np.ndarray]

LARGEST_FILE = 1 << 29
"""The most bytes that an image file may have. Files within Pillow's limit of pixels are smaller."""

_PROGRAMS = frozenset({"EPS"})  # Pillow starts Ghostscript for these, which runs what the file says

logger = logging.getLogger(__name__)


def open_image(source: ImageLike) -> Image.Image:
    """Open an image as RGB with 8 bits per channel.

    Files are turned as their EXIF data says, and so is a PIL image straight from `Image.open`. Other PIL
    images are taken as they are. Transparency is laid over white, and 16-bit values are scaled to 8 bits.

    Args:
        source: a path, a PIL image, or an RGB uint8 array [H, W, 3]. Of an animated PIL image the current
            frame is taken.

    Raises:
        InputError: the file is missing, truncated, not an image, too large to decode safely, or holds several
            pictures; values of more than 8 bits span less than a quarter of their scale or are floats; or the
            array has another shape or dtype.
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
        check_single(image, name)
        return _to_rgb(image, name)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file; see `open_image`.

    Args:
        name: the file's name, for messages.

    Raises:
        InputError: as `open_image`.
    """
    with _told(name), decoding(io.BytesIO(content)) as image:
        check_single(image, name)
        return _to_rgb(image, name)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what Pillow and the system raise about an image into an InputError that names it."""
    try:
        yield
    except (DitfError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such image") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a directory, not an image") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{name} has more than {limit:,} pixels", "scale it down first") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds
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
            return pictures_in(image)
    except Exception:  # Pillow's decoders raise a dozen kinds
        return 1


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise InputError(
            f"an image array must be RGB uint8 [H, W, 3], got {array.dtype} {list(array.shape)}",
            "scale other values to 0..255 by one rule for all of your images, and repeat grey three times",
        )
    return Image.fromarray(np.ascontiguousarray(array), "RGB")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name} is empty: {image.width}x{image.height} pixels")
    samples = stored_samples(image)
    image.load()
    if isinstance(image, ImageFile.ImageFile):
        image = ImageOps.exif_transpose(image)
    else:
        _tell_orientation(image)
    image = to_8_bits(image, samples, name)
    if image.has_transparency_data:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _tell_orientation(image: Image.Image) -> None:
    """Log a warning if an image that is not turned here carries an orientation in its EXIF data."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in range(2, 9):
        logger.warning(
            "a PIL image carries an EXIF orientation (%d) and is taken as its pixels are, without turning it;"
            " pass ImageOps.exif_transpose(image), or remove image.info['exif'] if it is upright",
            orientation,
        )


def _one_line(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError) and "identify" in str(error):
        return "no kind of image that Pillow reads"  # Pillow's own text holds the file object's address
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).split("\n")[0][:120] or type(error).__name__
