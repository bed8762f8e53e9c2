"""Writing protocol buffers as text, as far as a config.pbtxt needs it, without protobuf or a schema.

https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Enum(str):
    """A value of an enumeration, which is written without quotes."""


def pbtxt(message: Mapping[str, Any]) -> str:
    """Format a message as text.

    Args:
        message: {field: value}. A mapping becomes a message and a list a repeated field; `entries` makes the
            value of a map field. Scalars are strings, integers, booleans and `Enum`.
    """
    return "\n".join(_lines(message, "")) + "\n"


def entries(mapping: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a map field."""
    return [{"key": key, "value": value} for key, value in mapping.items()]


def _lines(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _nested(name, value, indent)
        elif isinstance(value, (list, tuple)):
            if any(isinstance(item, Mapping) for item in value):
                for item in value:
                    yield from _nested(name, item, indent)
            else:
                yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _nested(name: str, message: Mapping[str, Any], indent: str) -> Iterator[str]:
    yield f"{indent}{name} {{"
    yield from _lines(message, indent + "  ")
    yield f"{indent}}}"


def _scalar(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    # Bytes beyond printable ASCII become octal escapes of three digits.
    text = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in str(value).encode("utf-8")
    )
    return f'"{text}"'
