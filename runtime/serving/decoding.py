"""Encoded images out of requests: their size is known before a pixel is decoded."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from ditf.runtime.errors import InputError
from ditf.runtime.images import open_image
from ditf.runtime.serving.errors import TooLarge

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")  # no others: some of Pillow's start programs
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode_image(data: bytes, pixels: int) -> Image.Image:
    """An encoded image as RGB; see `open_image`.

    Args:
        data: a PNG, JPEG, WebP, BMP, TIFF or PPM file.
        pixels: that it may have.

    Raises:
        TooLarge: it has more.
        InputError: none of these formats, or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            check_pixels((image.height, image.width), pixels)
            return open_image(image)
    except _BOMBS:
        raise TooLarge(f"the image has more than {pixels:,} pixels", "scale it down first") from None
    except UnidentifiedImageError:
        raise InputError("the image is none of PNG, JPEG, WebP, BMP, TIFF and PPM") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        line = str(error).split("\n")[0][:120]
        raise InputError(f"the image cannot be read ({line})", "re-encode it as PNG or JPEG") from error


def check_pixels(size: tuple[int, int], pixels: int) -> None:
    """Reject an image of (H, W) beyond a limit.

    Raises:
        TooLarge: it is.
    """
    height, width = size
    if height * width > pixels:
        raise TooLarge(
            f"the image has {height * width:,} pixels, more than {pixels:,}", "scale it down first"
        )
