"""Reading JSON files from elsewhere, which must be regular files of bounded size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ditf.runtime.files.reading import read_regular


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
