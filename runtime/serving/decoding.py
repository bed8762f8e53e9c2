"""Decoding images out of requests. The cost of decoding is bounded before a pixel is decoded."""

from __future__ import annotations

import io
import re

from PIL import Image, UnidentifiedImageError

from ditf.runtime.errors import InputError
from ditf.runtime.images import check_single, open_image
from ditf.runtime.serving.errors import TooLarge
from ditf.runtime.serving.limits import Limits

JPEG_SCANS = 32
"""The most scans of a JPEG. Progressive files usually have 10; each costs a pass over the image."""

SLOW_BYTES = 1 << 20
"""The most bytes of a file that Pillow decodes in Python: plain (ASCII) PPM or run-length encoded BMP."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")  # some other decoders of Pillow start programs
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # excludes stuffed bytes and restarts within a scan
_PLAIN_PPM = (b"P1", b"P2", b"P3")
_RLE = (1, 2)  # values of a BMP's compression


def decode_upload(data: bytes, limits: Limits) -> Image.Image:
    """Decode an encoded image to RGB; see `open_image`.

    Args:
        data: a PNG, JPEG, WebP, BMP, TIFF or PPM file.
        limits: its `pixels` and `side` are used.

    Raises:
        TooLarge: the image has too many pixels or scans, or is a large file of a kind that is slow to decode.
        InputError: the file has none of these formats, is damaged, or cannot be taken (see `open_image`).
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            check_size((image.height, image.width), limits)
            _check_cost(data, image)
            check_single(image, "the image")
            return open_image(image)
    except _BOMBS:
        raise TooLarge(f"the image has more than {limits.pixels:,} pixels", "scale it down first") from None
    except UnidentifiedImageError:
        raise InputError("the image is none of PNG, JPEG, WebP, BMP, TIFF and PPM") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        line = str(error).split("\n")[0][:120]
        raise InputError(f"the image cannot be read ({line})", "re-encode it as PNG or JPEG") from error


def check_size(size: tuple[int, int], limits: Limits) -> None:
    """Check the size (H, W) of an image.

    Raises:
        TooLarge: the image has too many pixels, or a side is too long.
    """
    height, width = size
    if height * width > limits.pixels:
        raise TooLarge(
            f"the image has {height * width:,} pixels, more than {limits.pixels:,}", "scale it down first"
        )
    if max(size) > limits.side:
        raise TooLarge(
            f"the image is {width}x{height} pixels, a side more than {limits.side:,}", "scale it down first"
        )


def _check_cost(data: bytes, image: Image.Image) -> None:
    if image.format in ("JPEG", "MPO") and _scans(data, JPEG_SCANS + 1) > JPEG_SCANS:
        raise TooLarge(f"the JPEG has more than {JPEG_SCANS} scans", "re-encode it")
    slow = data[:2] in _PLAIN_PPM or (image.format == "BMP" and image.info.get("compression") in _RLE)
    if slow and len(data) > SLOW_BYTES:
        raise TooLarge(
            f"a plain PPM or a run-length encoded BMP of {len(data):,} bytes is more than {SLOW_BYTES:,}",
            "re-encode it as PNG or JPEG",
        )


def _scans(data: bytes, most: int) -> int:
    """Count the scans of the first picture in a JPEG file up to `most`. Segments are skipped by length."""
    count, position = 0, 2
    while count < most:
        marker = _MARKER.search(data, position)
        if marker is None:
            break
        position, kind = marker.end(), data[marker.end() - 1]
        if kind == 0xD9:  # the end of the picture
            break
        if kind == 0xDA:
            count += 1
        if kind not in (0x01, 0xD8):  # those two have no length
            position += int.from_bytes(data[position : position + 2], "big")
    return count
