"""Reads the header of a GGUF file: its metadata, and where each tensor lies.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader` reads
the same, but makes Python objects of every element of every array, so that a damaged length keeps it busy for
hours. This reader skips long arrays, and stops after a fixed number of bytes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import open_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LARGEST_HEADER = 64 << 20  # bytes: the vocabularies of language models have a few MB
_LARGEST_ARRAY = 64  # elements of an array that is kept; longer ones are vocabularies
_LARGEST_RANK = 8
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_AGAIN = "download the file again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a GGUF file.

    Attributes:
        shape: its shape in the order of torch, the slowest dimension first.
        kind: its type, as `gguf.GGMLQuantizationType` numbers them.
        start: offset of its first byte in the file.
        size: its size in bytes.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        metadata: {key: value}; long arrays, such as vocabularies, are left out.
        tensors: {name: where it lies}.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Damaged(Exception):
    """The header breaks the format's rules; the message says how."""


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file; no tensor is read.

    Raises:
        InputError: the file cannot be read, is not GGUF, is truncated or damaged, or has a type that the
            installed gguf package does not know.
    """
    try:
        with open_regular(path) as file:
            file.seek(0, 2)
            size = file.tell()
            file.seek(0)
            return _header(_Cursor(file), size)
    except _Damaged as error:
        raise InputError(f"{path} is not a readable GGUF file ({error})", _AGAIN) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})", "check the path") from error


class _Cursor:
    """Reads values one after the other, up to the largest size of a header."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset = 0

    def take(self, count: int) -> bytes:
        self.offset += count
        if self.offset > _LARGEST_HEADER:
            raise _Damaged(f"its header has more than {_LARGEST_HEADER >> 20} MB")
        taken = self._file.read(count)
        if len(taken) < count:
            raise _Damaged("its header is cut off")
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise _Damaged("a name in its header is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """A value of a metadata type; None for an array that is not kept."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _Damaged(f"its header has a value of the unknown type {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS and length > _LARGEST_ARRAY:
            self.take(length * struct.calcsize(f"<{_SCALARS[inner]}"))
            return None
        if inner == _ARRAY:
            raise _Damaged("its header has arrays of arrays")
        values = []
        for _ in range(length):  # an element has at least a byte, so `take` bounds the loop
            value = self.value(inner)
            if length <= _LARGEST_ARRAY:
                values.append(value)
        return values if length <= _LARGEST_ARRAY else None


def _header(cursor: _Cursor, size: int) -> Header:
    if size < len(MAGIC) or cursor.take(len(MAGIC)) != MAGIC:
        raise _Damaged("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise _Damaged(f"it has version {version}, or another byte order")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise _Damaged(f"its alignment is {alignment!r:.40}")
    start = -(-cursor.offset // alignment) * alignment
    found: dict[str, StoredTensor] = {}
    for name, dimensions, kind, offset in entries:
        if name in found:
            raise _Damaged(f"it has {name!a:.80} twice")
        tensor = _tensor(name, dimensions, kind, start + offset)
        if tensor.start + tensor.size > size:
            raise _Damaged(f"{name!a:.80} ends at byte {tensor.start + tensor.size:,} of {size:,}")
        found[name] = _reshaped(tensor, metadata.get(f"comfy.gguf.orig_shape.{name}"))
    return Header(metadata, found)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = cursor.string(), cursor.number("I")
    if rank > _LARGEST_RANK:
        raise _Damaged(f"{name!a:.80} has {rank} dimensions")
    dimensions = tuple(cursor.number("Q") for _ in range(rank))
    return name, dimensions, cursor.number("I"), cursor.number("Q")


def _tensor(name: str, dimensions: tuple[int, ...], kind: int, start: int) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in GGMLQuantizationType.__members__.values():
        raise InputError(
            f"{name!a:.80} has the GGUF type {kind}, which the installed gguf package does not know",
            "run: pip install --upgrade gguf",
        )
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if dimensions and dimensions[0] % block:
        raise _Damaged(f"rows of {name!a:.80} have {dimensions[0]} elements, no multiple of {block}")
    size = math.prod(dimensions) // block * block_bytes
    return StoredTensor(tuple(reversed(dimensions)), kind, start, size)


def _reshaped(tensor: StoredTensor, shape: Any) -> StoredTensor:
    """The tensor in the shape that ComfyUI-GGUF notes for one that it had to flatten to store it."""
    if shape is None:
        return tensor
    if not isinstance(shape, list) or math.prod(shape) != math.prod(tensor.shape):
        raise _Damaged(f"it notes the shape {shape!r:.60} for a tensor of {list(tensor.shape)}")
    return StoredTensor(tuple(shape), tensor.kind, tensor.start, tensor.size)
