"""An ONNX graph in memory: the bytes of its file, and the weights that it refers to in another file.

Whatever runs or compiles a graph gets these bytes and not a path, so that what was hashed is what is used; a
file that is opened a second time may be another one. The references are read from the graph itself, because a
graph can name any file as the place of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from ditf.runtime.files.reading import open_regular

Buffer = Union[bytes, bytearray, memoryview]

# Fields of onnx.proto that lead to a tensor: {message: {field number: message}}.
FIELDS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14  # of TensorProto
_GRAPH, _INITIALIZER = 7, 5
_EXTERNAL = 1  # TensorProto.DataLocation
_DEEPEST = 64  # nested messages; graphs nest in attributes

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf

_TYPES_BY_BYTES = {1: (2, 3, 9, 17, 18, 19, 20), 2: (4, 5, 10, 16), 4: (1, 6, 12), 8: (7, 11, 13)}
ITEM_BYTES = {dtype: size for size, dtypes in _TYPES_BY_BYTES.items() for dtype in dtypes}
"""Bytes of one element by TensorProto.DataType. Types of less than a byte are left out."""


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose values are in another file.

    Attributes:
        dtype: its number in TensorProto.DataType.
        location: the other file, as the graph names it.
        offset, length: where the values lie in that file, in bytes; length is None if the graph omits it.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int | None


class Graph:
    """An ONNX graph and its weights, both in memory.

    Args:
        path: where the graph came from, for messages.
        model: the bytes of its file.
        weights: {file that the graph refers to: its bytes}.

    Attributes:
        path, model, weights: as given.
        tensors: {name: (tensor, its bytes)} of the initializers whose values are in another file.

    Raises:
        ValueError: the bytes are not ONNX, or refer to something that is not in `weights`.
    """

    def __init__(self, path: Path, model: bytes, weights: Mapping[str, Buffer]) -> None:
        self.path = path
        self.model = model
        self.weights = weights
        self.tensors: dict[str, tuple[ExternalTensor, memoryview]] = {}
        for tensor in external_tensors(model):
            if tensor.name in self.tensors:
                raise ValueError(f"two initializers are named {tensor.name!r}")
            self.tensors[tensor.name] = (tensor, _values(tensor, weights))

    @classmethod
    def read(cls, path: Path) -> Graph:
        """Read a graph that needs no verification, and the weights that lie beside it.

        Raises:
            OSError: a file cannot be read.
            ValueError: the file is not ONNX, or refers to another folder.
        """
        with open_regular(path) as file:
            model = file.read()
        weights = {}
        for location in {tensor.location for tensor in external_tensors(model)}:
            if Path(location).name != location:
                raise ValueError(f"it refers to {location!r}, which is not beside it")
            with open_regular(path.with_name(location)) as file:
                weights[location] = file.read()
        return cls(path, model, weights)


def external_tensors(model: bytes) -> list[ExternalTensor]:
    """The initializers of the main graph whose values are in another file.

    Raises:
        ValueError: the bytes are not ONNX, or a tensor that is no initializer of the main graph is in another
            file.
    """
    tensors = []
    graphs = 0
    view = memoryview(model)
    for field, value in _fields(view):
        if field == _GRAPH and isinstance(value, memoryview):
            graphs += 1
            for inner, message in _fields(value):
                if inner == _INITIALIZER and isinstance(message, memoryview):
                    tensor = _external_tensor(message)
                    if tensor is not None:
                        tensors.append(tensor)
                else:
                    _check_embedded("GraphProto", inner, message, 1)
        else:
            _check_embedded("ModelProto", field, value, 0)
    if graphs != 1:
        raise ValueError("not an ONNX model")
    return tensors


def _check_embedded(message: str, field: int, value: memoryview | int, depth: int) -> None:
    """Raise ValueError if a tensor in this field, or in what it holds, is in another file."""
    kind = FIELDS.get(message, {}).get(field)
    if kind is None or not isinstance(value, memoryview):
        return
    if depth > _DEEPEST:
        raise ValueError(f"its graphs are nested more than {_DEEPEST} deep")
    if kind == "TensorProto":
        if _is_external(value):
            raise ValueError("a tensor that is no initializer of the main graph is in another file")
        return
    for inner, content in _fields(value):
        _check_embedded(kind, inner, content, depth + 1)


def _is_external(tensor: memoryview) -> bool:
    return any(
        field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value == _EXTERNAL)
        for field, value in _fields(tensor)
    )


def _external_tensor(message: memoryview) -> ExternalTensor | None:
    """The initializer that a message describes; None if its values are in the message."""
    if not _is_external(message):
        return None
    shape: list[int] = []
    entries: dict[str, str] = {}
    name, dtype = "", 0
    for field, value in _fields(message):
        if field == _DIMS:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif field == _DATA_TYPE and isinstance(value, int):
            dtype = value
        elif field == _NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif field == _EXTERNAL_DATA and isinstance(value, memoryview):
            entry = {key: str(text, "utf-8") for key, text in _fields(value) if isinstance(text, memoryview)}
            entries[entry.get(1, "")] = entry.get(2, "")
    if "location" not in entries or not {*entries} <= {"location", "offset", "length", "checksum"}:
        raise ValueError(f"{name!r} is in another file that it does not name")
    numbers = [entries.get("offset", "0"), entries.get("length", "0")]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise ValueError(f"{name!r} has no valid offset and length")
    length = int(entries["length"]) if "length" in entries else None
    return ExternalTensor(name, dtype, tuple(shape), entries["location"], int(numbers[0]), length)


def _values(tensor: ExternalTensor, weights: Mapping[str, Buffer]) -> memoryview:
    if tensor.location not in weights:
        raise ValueError(f"{tensor.name!r} is in {tensor.location!r}, which is none of its files")
    content = memoryview(weights[tensor.location])
    length = len(content) - tensor.offset if tensor.length is None else tensor.length
    if length < 0 or tensor.offset + length > len(content):
        raise ValueError(f"{tensor.name!r} lies outside {tensor.location!r}")
    size = ITEM_BYTES.get(tensor.dtype)
    count = 1
    for side in tensor.shape:
        count *= side
    if size is not None and count * size != length:
        raise ValueError(f"{tensor.name!r} has {length:,} bytes, its shape needs {count * size:,}")
    return content[tensor.offset : tensor.offset + length]


def _packed(value: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        numbers.append(number)
    return numbers


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Iterate over a protobuf message's fields as (number, value), the value an integer or bytes.

    Raises:
        ValueError: the bytes are not a protobuf message.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            number, position = _varint(message, position)
            yield field, number
            continue
        if wire == _BYTES:
            length, position = _varint(message, position)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("not an ONNX model")
        if position + length > len(message):
            raise ValueError("it is truncated, or not an ONNX model")
        if wire == _BYTES:
            yield field, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Read a number of at most 64 bits. Returns it and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & (2**64 - 1), position
    raise ValueError("it is truncated, or not an ONNX model")
