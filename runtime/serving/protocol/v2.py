"""The messages of the Open Inference Protocol over HTTP, in JSON and with the binary tensor data extension.

The protocol is specified in kserve/open-inference-protocol, specification/protocol/inference_rest.md, and the
extension in triton-inference-server/server, docs/protocol/extension_binary_data.md, whose "raw binary
requests" are included. All that a request states about itself is checked before it is used.
"""

from __future__ import annotations

import json
import math
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ditf.runtime.errors import InputError
from ditf.runtime.serving.errors import TooLarge
from ditf.runtime.serving.protocol.contract import ModelSpec, TensorSpec
from ditf.runtime.serving.protocol.json_numbers import cut_data, read_numbers, write_numbers

NUMPY_TYPES = {"UINT8": "u1", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4"}
"""numpy's names for those of the protocol's types that the models use."""

BINARY_SIZE = "binary_data_size"
BINARY = "binary_data"
ALL_BINARY = "binary_data_output"
TIMEOUT = "timeout"  # in microseconds, from Triton's schedule policy extension

REST_BYTES = 1 << 20
"""The most bytes of JSON beside the tensors' numbers."""

# Triton's clients send these parameters of other extensions at their defaults; they have no effect here.
_IGNORED = frozenset({"priority", "sequence_id", "sequence_start", "sequence_end"})
_JSON_ELEMENTS = 1 << 22  # in an answer; as text they take about 20 bytes each


@dataclass(frozen=True)
class InferRequest:
    """A request whose tensors are those of the model.

    Attributes:
        id: the id that the answer repeats; None if there is none.
        inputs: arrays by name, which may be views of the body.
        outputs: the names of the wanted outputs in order, each with whether it is sent as binary data.
        parameters: the parameters that the model takes, as strings.
        timeout_s: the timeout in seconds; None if it was not given.
    """

    id: str | None
    inputs: dict[str, np.ndarray]
    outputs: tuple[tuple[str, bool], ...]
    parameters: dict[str, str]
    timeout_s: float | None


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo a body's Content-Encoding.

    Args:
        encoding: "gzip" or "deflate" (zlib's format, RFC 9110), or "identity".
        limit: the most bytes that may come out.

    Raises:
        TooLarge: the body inflates to more.
        InputError: the encoding is not supported, or the body does not have it.
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise InputError(f"Content-Encoding {encoding!r:.40} is not supported", "use gzip or deflate")
    machine = zlib.decompressobj(zlib.MAX_WBITS + (16 if encoding == "gzip" else 0))
    try:
        data = machine.decompress(body, limit + 1)
    except zlib.error as error:
        raise InputError(f"the body is not {encoding} ({error})") from None
    if len(data) > limit:
        raise TooLarge(f"the body inflates to more than {limit:,} bytes")
    if not machine.eof or machine.unused_data:
        raise InputError(f"the body's {encoding} data is truncated, or goes on after its end")
    return data


def parse_request(body: bytes, header_length: str | None, model: ModelSpec, json_limit: int) -> InferRequest:
    """Read a request's body.

    Args:
        body: the body, already inflated.
        header_length: the Inference-Header-Content-Length header; None if there is none.
        model: the model that the request is for.
        json_limit: the most bytes of JSON.

    Raises:
        InputError: the body does not follow the protocol, or its tensors are not this model's.
        TooLarge: there is more JSON.
    """
    length = json_length(len(body), header_length)
    if length == 0 and header_length is not None:
        return _raw_request(body, model)
    if length > json_limit:
        raise TooLarge(
            f"{length:,} bytes of JSON are more than {json_limit:,}", "send tensors as binary data"
        )
    text, data = cut_data(body, length)
    if len(text) > REST_BYTES:
        raise TooLarge(
            f"{len(text):,} bytes of JSON beside the tensors' numbers are more than {REST_BYTES:,}",
            "send numbers alone as data",
        )
    document = _object(_json(text), "the request")
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InputError("id is not a string")
    parameters = _object(document.get("parameters", {}), "parameters")
    all_binary = _flag(parameters, ALL_BINARY, False)
    return InferRequest(
        request_id,
        _inputs(document.get("inputs"), data, memoryview(body)[length:], model),
        _outputs(document.get("outputs"), all_binary, model),
        _model_parameters(parameters, model),
        _timeout(parameters),
    )


def json_length(body: int, header_length: str | None) -> int:
    """The bytes of JSON in a body of `body` bytes; 0 for a raw binary request.

    Raises:
        InputError: the Inference-Header-Content-Length header is not a length, or is longer than the body.
    """
    if header_length is None:
        return body
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 16):
        raise InputError(f"Inference-Header-Content-Length {header_length!r:.40} is not a length")
    length = int(header_length)
    if length > body:
        raise InputError(f"a header of {length:,} bytes does not fit a body of {body:,}")
    return length


def encode_response(
    model: str, version: str, request: InferRequest, results: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """Encode an answer. Returns its body, and the length of its JSON if binary data follows it, else None.

    Args:
        results: all outputs of the model, in the types of the contract.

    Raises:
        InputError: a large tensor was asked for as JSON.
    """
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    secret, numbers = secrets.token_hex(16), dict[bytes, bytes]()
    for name, binary in request.outputs:
        array = results[name]
        datatype = next(key for key, dtype in NUMPY_TYPES.items() if np.dtype(dtype) == array.dtype)
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            data = array.astype(NUMPY_TYPES[datatype], copy=False).tobytes()
            entry["parameters"] = {BINARY_SIZE: len(data)}
            tail.append(data)
        elif array.size > _JSON_ELEMENTS:
            raise InputError(f"{name} has {array.size:,} numbers, too many for JSON", "ask for binary_data")
        else:
            entry["data"] = f"{secret}-{len(outputs)}"
            numbers[json.dumps(entry["data"]).encode()] = write_numbers(array)
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": outputs}
    if request.id is not None:
        document["id"] = request.id
    head = json.dumps(document, allow_nan=False).encode()
    for marker, text in numbers.items():
        head = head.replace(marker, text)
    return b"".join([head, *tail]), len(head) if tail else None


def _raw_request(body: bytes, model: ModelSpec) -> InferRequest:
    """Read a body that is the data of the only input. Its length decides the dimension that varies."""
    wanted = [spec for spec in model.inputs if spec.shape.count(-1) == 1]
    if len(model.inputs) != 1 or not wanted:
        raise InputError(f"{model.name} has no single input to be sent raw", "send a JSON header with it")
    spec = wanted[0]
    item = np.dtype(NUMPY_TYPES[spec.datatype]).itemsize * math.prod(n for n in spec.shape if n != -1)
    if not body or len(body) % item:
        raise InputError(f"{len(body):,} bytes are no multiple of {item:,}, one {spec.name} of {model.name}")
    array = np.frombuffer(body, NUMPY_TYPES[spec.datatype]).reshape(spec.shape)
    return InferRequest(None, {spec.name: array}, _outputs(None, True, model), {}, None)


def _inputs(
    entries: Any, data: Mapping[str, bytes], binary: memoryview, model: ModelSpec
) -> dict[str, np.ndarray]:
    specs = {spec.name: spec for spec in model.inputs}
    arrays: dict[str, np.ndarray] = {}
    offset = 0
    for entry in _objects(entries, "inputs"):
        name = entry.get("name")
        if not isinstance(name, str) or name not in specs:
            raise InputError(f"{model.name} has no input {name!r:.60}", f"it takes {_names(specs)}")
        if name in arrays:
            raise InputError(f"input {name} is given twice")
        spec = specs[name]
        if entry.get("datatype") != spec.datatype:
            raise InputError(f"{name} is {spec.datatype}, not {entry.get('datatype')!r:.40}")
        shape = _shape(entry.get("shape"), spec)
        size = _size(entry, name)
        if size is None:
            dtype = np.dtype(NUMPY_TYPES[spec.datatype])
            arrays[name] = read_numbers(entry.get("data"), data, name, shape, dtype)
            continue
        count = math.prod(shape)
        needed = count * np.dtype(NUMPY_TYPES[spec.datatype]).itemsize
        if size != needed:
            raise InputError(
                f"{name} of shape {list(shape)} has {needed:,} bytes, not the {size:,} announced"
            )
        if offset + size > len(binary):
            raise InputError(f"{name} has {size:,} bytes, of which {len(binary) - offset:,} arrived")
        arrays[name] = np.frombuffer(binary, NUMPY_TYPES[spec.datatype], count, offset).reshape(shape)
        offset += size
    missing = specs.keys() - arrays.keys()
    if missing:
        raise InputError(f"{model.name} needs {_names(specs)}", f"{_names(missing)} is missing")
    if offset != len(binary):
        raise InputError(f"{len(binary) - offset:,} bytes follow the last tensor")
    return arrays


def _outputs(entries: Any, all_binary: bool, model: ModelSpec) -> tuple[tuple[str, bool], ...]:
    names = [spec.name for spec in model.outputs]
    if entries is None:
        return tuple((name, all_binary) for name in names)
    wanted: dict[str, bool] = {}
    for entry in _objects(entries, "outputs"):
        name = entry.get("name")
        if not isinstance(name, str) or name not in names:
            raise InputError(f"{model.name} has no output {name!r:.60}", f"it gives {_names(names)}")
        if name in wanted:
            raise InputError(f"output {name} is asked for twice")
        parameters = _object(entry.get("parameters", {}), f"parameters of {name}")
        _refuse_extensions(parameters, name)
        wanted[name] = _flag(parameters, BINARY, all_binary)
    return tuple(wanted.items())


def _size(entry: dict[str, Any], name: str) -> int | None:
    """The bytes of an input's binary data; None if its data is in the JSON."""
    parameters = _object(entry.get("parameters", {}), f"parameters of {name}")
    _refuse_extensions(parameters, name)
    size = parameters.get(BINARY_SIZE)
    if (size is None) == ("data" not in entry):
        raise InputError(f"{name} needs data or {BINARY_SIZE}, one of the two")
    if size is not None and not _is_count(size):
        raise InputError(f"{BINARY_SIZE} of {name} is {size!r:.40}, not a number of bytes")
    return size


def _shape(value: Any, spec: TensorSpec) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != len(spec.shape) or not all(map(_is_count, value)):
        raise InputError(
            f"{spec.name} has the shape {list(spec.shape)}, not {value!r:.60}", "-1 is any length"
        )
    if any(wanted not in (-1, given) for given, wanted in zip(value, spec.shape, strict=True)):
        raise InputError(f"{spec.name} has the shape {list(spec.shape)}, not {value}")
    return tuple(value)


def _model_parameters(parameters: dict[str, Any], model: ModelSpec) -> dict[str, str]:
    unknown = parameters.keys() - {ALL_BINARY, TIMEOUT, *_IGNORED, *model.parameters}
    if unknown:
        raise InputError(f"{model.name} takes no parameter {min(unknown)!r:.60}", _names(model.parameters))
    chosen = {name: parameters[name] for name in model.parameters if name in parameters}
    for name, value in chosen.items():
        if not isinstance(value, str):
            raise InputError(f"parameter {name} is not a string")
    return chosen


def _timeout(parameters: dict[str, Any]) -> float | None:
    timeout = parameters.get(TIMEOUT)
    if timeout is None:
        return None
    if not _is_count(timeout):
        raise InputError(f"timeout {timeout!r:.40} is not a number of microseconds")
    return timeout / 1e6 if timeout else None  # 0 stands for the server's own deadline


def _refuse_extensions(parameters: dict[str, Any], name: str) -> None:
    for extension in ("shared_memory_region", "classification"):
        if extension in parameters:
            raise InputError(f"{name}: {extension} is not supported", "send and ask for data")


def _json(text: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is not JSON ({error!s:.80})") from None


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} is not a JSON object")
    return value


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{what} is not a list of tensors")
    return [_object(entry, f"an entry of {what}") for entry in value]


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r:.40}, not true or false")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _names(names: Mapping[str, Any] | Sequence[str] | set[str]) -> str:
    return ", ".join(names) or "none"
