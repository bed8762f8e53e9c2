"""Reading and writing tensors as JSON numbers, piece by piece.

Python's json module holds the interpreter lock for a whole document and makes an object of every number and
list, so a few megabytes of JSON stop the event loop for seconds and take a gigabyte. The text of each
tensor's data is therefore cut out of a request before the rest is parsed, and converted to an array piece
by piece.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from ditf.runtime.errors import InputError

MEMORY = 5
"""The most bytes of memory that reading a tensor takes per byte of its text, beside the text itself."""

TEXT = 24
"""The most bytes that writing a number takes."""

_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(\[[][0-9eE+., \t\r\n-]*\])')
_NUMBER = b"0123456789eE+-."
_ZEROS = bytes.maketrans(_NUMBER, b"0" * len(_NUMBER))
_TENSORS = 64  # in one request; no model has more
_PIECE = 1 << 15  # bytes of text read at a time: a millisecond
_NUMBERS = 1 << 12  # written at a time


def cut_data(body: bytes, length: int) -> tuple[bytes, dict[str, bytes]]:
    """Cut the arrays of numbers under "data" out of a JSON document.

    Args:
        body: begins with the document, which has `length` bytes.

    Returns:
        The document, with names in place of the arrays that no client can predict; and the arrays' texts by
        these names.

    Raises:
        InputError: there are more arrays than any model has tensors.
    """
    secret = secrets.token_hex(16)
    texts: dict[str, bytes] = {}
    rest, position = [], 0
    for found in _DATA.finditer(body, 0, length):
        if len(texts) == _TENSORS:
            raise InputError(f"the request has data of more than {_TENSORS} tensors")
        name = f"{secret}-{len(texts)}"
        texts[name] = found[1]
        rest += [body[position : found.start(1)], f'"{name}"'.encode()]
        position = found.end()
    rest.append(body[position:length])
    return b"".join(rest), texts


def read_numbers(
    data: Any, texts: Mapping[str, bytes], name: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Read a tensor from nested lists of its shape, or from one flat list.

    Args:
        data: the tensor's data in a document that `cut_data` returned.
        texts: the texts that `cut_data` returned.
        name: the tensor's name, for errors.

    Raises:
        InputError: the data is not a list of numbers or has another shape, or the type does not hold a
        number.
    """
    if isinstance(data, list):  # it was not cut out, because it is small or holds more than numbers
        text = json.dumps(data).encode()
    elif isinstance(data, str) and data in texts:
        text = texts[data]
    else:
        raise InputError(f"data of {name} is no list")
    flat = _flat(text, name, shape)
    array = np.empty(math.prod(shape), dtype)
    filled = position = 0
    while position < len(flat):
        end = flat.find(b",", position + _PIECE)
        end = len(flat) if end < 0 else end
        if end - position > 2 * _PIECE:
            raise InputError(f"data of {name} has a number of more than {_PIECE:,} digits")
        numbers = _piece(flat[position:end], name, dtype)
        if filled + len(numbers) > len(array):
            break
        array[filled : filled + len(numbers)] = numbers
        filled += len(numbers)
        position = end + 1
    if filled != len(array):
        raise InputError(f"data of {name} is not an array of numbers")
    return array.reshape(shape)


def write_numbers(array: np.ndarray) -> bytes:
    """Write an array's numbers as a flat JSON list.

    Raises:
        ValueError: a number is not finite.
    """
    flat = array.ravel()
    pieces = (flat[i : i + _NUMBERS].tolist() for i in range(0, flat.size, _NUMBERS))
    return b"[" + b", ".join(json.dumps(one, allow_nan=False)[1:-1].encode() for one in pieces) + b"]"


def _flat(text: bytes, name: str, shape: tuple[int, ...]) -> bytes:
    """The numbers of a list of this shape, or of a flat list, with commas between them."""
    count = math.prod(shape)
    outline = text.translate(_ZEROS, b" \t\r\n")
    brackets = outline.translate(None, b"0")
    if brackets.translate(None, b"[],") or b"0[" in outline or b"]0" in outline:
        raise InputError(f"data of {name} is not an array of numbers")
    numbers = text.translate(None, b"[]")
    given = numbers.count(b",") + bool(numbers.strip())
    if (count and given != count) or not _is_outline(brackets, ((count,), shape)):
        raise InputError(f"{name} has the shape {list(shape)}, its data {given:,} numbers in other lists")
    return numbers if count else b""


def _is_outline(brackets: bytes, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether brackets are nested lists of one of the shapes.

    Lengths are compared first, because a shape with a 0 in it has no numbers but may have any number of
    lists.
    """
    return any(len(brackets) == _length(one) and brackets == _brackets(one) for one in shapes)


def _length(shape: tuple[int, ...]) -> int:
    """The length of `_brackets(shape)`, computed without making them."""
    length = 0
    for count in reversed(shape):
        length = 2 + max(0, (length + 1) * count - 1)
    return length


def _brackets(shape: tuple[int, ...]) -> bytes:
    """The brackets and commas of nested lists of a shape, without numbers."""
    lists = b""
    for length in reversed(shape):
        lists = b"[" + ((lists + b",") * length)[:-1] + b"]"
    return lists


def _piece(text: bytes, name: str, dtype: np.dtype) -> np.ndarray:
    try:
        numbers = np.array(json.loads(b"[" + text + b"]"))
    except (ValueError, OverflowError):
        raise InputError(f"data of {name} is not an array of numbers") from None
    integers = dtype.kind in "iu"
    if numbers.dtype.kind not in ("iu" if integers else "iuf"):
        raise InputError(f"data of {name} is not {'integers' if integers else 'numbers'}")
    if integers:
        info = np.iinfo(dtype)
        if not info.min <= numbers.min() <= numbers.max() <= info.max:
            raise InputError(f"data of {name} does not fit {dtype.name.upper()}")
    with np.errstate(over="ignore"):  # the code that uses the tensor refuses infinity
        return numbers.astype(dtype)
