"""Files that hold several pictures: animations, pages and stacks."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from PIL import Image

from ditf.runtime.errors import InputError

_ONE_PHOTOGRAPH = frozenset({"MPO", "HEIF", "PSD"})  # the others are versions or layers of the first picture
_MOST_PAGES = 1000
_SUBFILE_TYPE = 254  # a TIFF tag, the lowest there is, so that it comes first
_REDUCED_OR_MASK = 1 | 4  # bits of its value


def pictures_in(image: Image.Image) -> int:
    """The number of pictures in an image file that `Image.open` has just opened; at most 1000 are counted."""
    if image.format in _ONE_PHOTOGRAPH:
        return 1
    file = getattr(image, "fp", None)
    if image.format == "TIFF" and file is not None:
        return _tiff_pages(file)
    return min(int(getattr(image, "n_frames", 1)), _MOST_PAGES)


def check_single(image: Image.Image, name: str) -> None:
    """Reject a file of several pictures, of which Pillow would show the first.

    Args:
        image: the file, which `Image.open` has just opened.
        name: what to call it in messages.

    Raises:
        InputError: it is an animation, or has several pages.
    """
    count = pictures_in(image)
    if count > 1:
        number = f"{_MOST_PAGES} or more" if count == _MOST_PAGES else str(count)
        reader = "magick" if image.format in ("TIFF", "WEBP") else "ffmpeg -i"
        raise InputError(
            f"{name} holds {number} pictures", f"write each to its own file: {reader} FILE frame-%06d.png"
        )


def _tiff_pages(file: BinaryIO) -> int:
    """Count the pages of a TIFF file, without reduced versions of a page and masks.

    Pillow's own count reads every tag of every page, which takes minutes for some small files, and ends with
    an error at a page whose kind of pixels it does not know.
    """
    before = file.tell()
    count = 0
    try:
        for subfile_type in islice(_subfile_types(file), _MOST_PAGES):
            count += not subfile_type & _REDUCED_OR_MASK
    except (struct.error, OSError, OverflowError, ValueError):
        pass  # the file is damaged after its first page, which is the one that is read
    finally:
        file.seek(before)
    return max(1, count)


def _subfile_types(file: BinaryIO) -> Iterator[int]:
    """The subfile type of every page of a TIFF or BigTIFF file; 0 for a page that does not state it."""
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", head, 2)[0] == 43
    length, link = (struct.Struct(order + form) for form in ("QQ" if big else "HI"))
    entry = struct.Struct(order + ("H10xI4x" if big else "H6xI"))  # tag, type and count, value
    seen = set[int]()
    (place,) = link.unpack_from(head, 8 if big else 4)
    while place and place not in seen:
        seen.add(place)
        file.seek(place)
        (entries,) = length.unpack(file.read(length.size))
        tag, value = entry.unpack(file.read(entry.size))
        yield value if tag == _SUBFILE_TYPE else 0
        file.seek(place + length.size + entries * entry.size)
        (place,) = link.unpack(file.read(link.size))
