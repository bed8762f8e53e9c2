"""JSON files: read from elsewhere with bounded size and depth, and written for readers of any kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ditf.runtime.files.reading import read_regular
from ditf.runtime.printable import valid_unicode


def read_json(path: Path, limit: int) -> Any:
    """Read the value in a JSON file of at most `limit` bytes.

    Raises:
        OSError: as `read_regular`.
        ValueError: the content is not UTF-8, not JSON, or nested more deeply than Python can read.
    """
    try:
        return json.loads(read_regular(path, limit).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_text(document: Any, indent: int = 2) -> str:
    """The text of a JSON file, in ASCII.

    File names that are not UTF-8 are written with escapes (see `valid_unicode`).
    """
    return json.dumps(_valid(document), indent=indent) + "\n"


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return valid_unicode(value)
    if isinstance(value, dict):
        return {_valid(key): _valid(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(entry) for entry in value]
    return value
