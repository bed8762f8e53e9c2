"""Images whose samples have more than 8 bits: the scale that they are on, and how they become 8 bits.

Pillow keeps such grey images as they are (modes I and I;16) and reduces colour to 8 bits as it reads a file.
Neither shows how much of the range a camera uses: 12-bit values in a 16-bit file would be nearly black.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Optional

import numpy as np
from PIL import Image, ImageFile

from ditf.runtime.errors import InputError

_LEAST_SHARE = 4  # values must span a quarter of the scale, or 64 of the 256 levels of 8 bits
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF 6.0's tags
_SEPARATE, _SIGNED = 2, 2  # values of the latter two
_DEEP_RAW_MODE = re.compile(";16[BLN]")  # bits of a sample; without a letter they are those of a pixel
_J2K_SIZE = b"\xff\x4f\xff\x51"  # the markers SOC and SIZ, which begin a JPEG 2000 codestream
_J2K_PRECISION = 42  # bytes from there to the first channel's bits, less one


@dataclass(frozen=True)
class Samples:
    """How the samples of an image are stored.

    Attributes:
        largest: the value that stands for full intensity, 255 for 8 bits.
        white_is_zero: Pillow leaves the values inverted.
        wrong: why Pillow would misread them, or None.
    """

    largest: int = 255
    white_is_zero: bool = False
    wrong: Optional[str] = None


def stored_samples(image: Image.Image) -> Samples:
    """How an image's samples are stored. Of a colour file this is only known until its pixels are loaded."""
    deep = image.mode.startswith("I")
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return _tiff_samples(tags, deep)
    if deep or (isinstance(image, ImageFile.ImageFile) and _deep_colour(image)):
        return Samples(65535)
    return Samples()


def to_8_bits(image: Image.Image, samples: Samples, name: str) -> Image.Image:
    """Scale an image's values to 8 bits so that `samples.largest` becomes 255.

    Args:
        image: a loaded image; any of 8 bits is returned as it is.
        samples: the result of `stored_samples`.
        name: what to call the image in messages.

    Raises:
        InputError: the values lie outside the scale or span less than a quarter of it, so that the picture
            would come out dark or flat; they are floats; or Pillow misreads them.
    """
    if samples.wrong is not None:
        raise InputError(f"{name} {samples.wrong}", "save it with unsigned 8 bits, as PNG for example")
    if image.mode == "F":
        raise InputError(f"{name} is a float image of unknown range", "convert it to 8 bits")
    if samples.largest == 255:
        return image
    if "transparency" in image.info:
        raise InputError(
            f"{name} has 16 bits and a transparent colour, which Pillow compares with 8 bits",
            "save it with an alpha channel",
        )
    if not image.mode.startswith("I"):  # of each sample Pillow has kept the upper byte
        upper = np.asarray(image.convert("RGB"))
        _check_span(256 * int(upper.min()), 256 * int(upper.max()) + 255, samples.largest, name)
        return image
    grey = np.asarray(image).astype(np.int64)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > samples.largest:
        raise InputError(f"{name} has values outside 16 bits: {low:,} to {high:,}", "convert it to 8 bits")
    _check_span(low, high, samples.largest, name)
    scaled = np.round(grey / (samples.largest / 255)).astype(np.uint8)
    return Image.fromarray(255 - scaled if samples.white_is_zero else scaled)


def _check_span(low: int, high: int, largest: int, name: str) -> None:
    """Raise an InputError if values from `low` to `high` do not fill enough of 0..`largest`.

    A flat image is measured from 0, so that full intensity and black are accepted.
    """
    span = high - low if low < high else high
    if span == 0 or span * _LEAST_SHARE >= largest:
        return
    bits = high.bit_length()
    rule = f"value / {2**bits - 1} * 255" if bits <= 14 else f"(value - {low}) / {max(span, 1)} * 255"
    raise InputError(
        f"{name} has values from {low:,} to {high:,} on a scale of 0 to {largest:,}, so it would come out"
        f" {'dark' if high * _LEAST_SHARE < largest else 'flat'}",
        f"scale it to 8 bits by one rule for all of your images, for example {rule}",
    )


def _tiff_samples(tags: Mapping[int, Any], deep: bool) -> Samples:
    bits, signed = max(tags.get(_BITS, (1,))), _SIGNED in tags.get(_SAMPLE_FORMAT, (1,))
    if bits == 8 and signed:
        return Samples(wrong="has signed 8-bit values, which Pillow takes for unsigned ones")
    if bits == 16 and not deep and tags.get(_PLANES) == _SEPARATE:
        return Samples(wrong="has 16-bit colours in separate planes, which Pillow reads as 8-bit ones")
    if deep:
        largest = 4095 if bits == 12 else 32767 if bits == 16 and signed else 65535
        return Samples(largest, white_is_zero=tags.get(_PHOTOMETRIC) == 0)
    return Samples(65535 if bits == 16 else 255)


def _deep_colour(image: ImageFile.ImageFile) -> bool:
    """Whether a colour file that is not loaded yet has more than 8 bits a sample."""
    if not image.tile:
        return False
    arguments = image.tile[0].args
    if isinstance(arguments, str):
        return _DEEP_RAW_MODE.search(arguments) is not None  # of PNG, for example
    if image.format == "JPEG2000" and image.fp is not None:
        return _jpeg2000_bits(image.fp) > 8  # type: ignore[arg-type]
    first, *others = arguments or ("",)
    if image.format == "PPM":
        return any(isinstance(one, int) and one > 255 for one in others)  # the largest value
    return _DEEP_RAW_MODE.search(str(first)) is not None


def _jpeg2000_bits(file: BinaryIO) -> int:
    position = file.tell()
    file.seek(0)
    head = file.read(1 << 16)
    file.seek(position)
    start = head.find(_J2K_SIZE)
    if start < 0 or len(head) <= start + _J2K_PRECISION:
        return 8
    return int(struct.unpack_from("B", head, start + _J2K_PRECISION)[0] & 0x7F) + 1
