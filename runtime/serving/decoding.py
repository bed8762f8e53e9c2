"""Encoded images out of requests: what decoding them costs is bounded before a pixel is decoded."""

from __future__ import annotations

import io
import re

from PIL import Image, UnidentifiedImageError

from ditf.runtime.errors import InputError
from ditf.runtime.images import open_image
from ditf.runtime.serving.errors import TooLarge
from ditf.runtime.serving.limits import Limits

JPEG_SCANS = 32
"""Scans that a JPEG may have. Progressive files have 10 by default; each costs a pass over the image."""

SLOW_BYTES = 1 << 20
"""Of a file whose decoder is written in Python: plain (ASCII) PPM, and run-length encoded BMP."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")  # no others: some of Pillow's start programs
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # not a stuffed byte, nor a restart within a scan
_PLAIN_PPM = (b"P1", b"P2", b"P3")
_RLE = (1, 2)  # compression of a BMP


def decode_upload(data: bytes, limits: Limits) -> Image.Image:
    """An encoded image as RGB; see `open_image`.

    Args:
        data: a PNG, JPEG, WebP, BMP, TIFF or PPM file.
        limits: `pixels` and `side` are used.

    Raises:
        TooLarge: it has more pixels, or more scans, or is a large file of a kind that is slow to decode.
        InputError: none of these formats, or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            check_size((image.height, image.width), limits)
            _check_cost(data, image)
            return open_image(image)
    except _BOMBS:
        raise TooLarge(f"the image has more than {limits.pixels:,} pixels", "scale it down first") from None
    except UnidentifiedImageError:
        raise InputError("the image is none of PNG, JPEG, WebP, BMP, TIFF and PPM") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        line = str(error).split("\n")[0][:120]
        raise InputError(f"the image cannot be read ({line})", "re-encode it as PNG or JPEG") from error


def check_size(size: tuple[int, int], limits: Limits) -> None:
    """Reject an image of (H, W) beyond a limit.

    Raises:
        TooLarge: it is.
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
    """Scans of the first picture in a JPEG file, at most `most`; segments are skipped by their length."""
    count, position = 0, 2
    while count < most:
        marker = _MARKER.search(data, position)
        if marker is None:
            break
        position, kind = marker.end(), data[marker.end() - 1]
        if kind == 0xD9:  # the end; what follows is no part of the picture
            break
        if kind == 0xDA:
            count += 1
        if kind not in (0x01, 0xD8):  # those two have no length
            position += int.from_bytes(data[position : position + 2], "big")
    return count
