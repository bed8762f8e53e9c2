"""What a verb prints and writes: messages, results, tables, and the --json document."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any, Optional

from ditf.cli.support.state import state
from ditf.runtime.files.json_file import json_text
from ditf.runtime.files.writing import write_whole
from ditf.runtime.printable import printable

SCHEMA = 1  # of every --json document


def tell(line: str) -> None:
    """Print a line on stderr, also with --quiet. A closed pipe or terminal does not end the command."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def say(line: str) -> None:
    """Print a line on stderr, unless --quiet is given."""
    if not state.quiet:
        tell(line)


def show(text: str) -> None:
    """Print a result on stdout. A closed pipe, as after `| head`, ends the output but not the command."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(path: Optional[Path], document: dict[str, Any], ok: bool = True) -> None:
    """Write `document` with "schema" and "ok" as JSON, if there is a path."""
    if path is not None:
        write_whole(path, json_text(_finite({"schema": SCHEMA, "ok": ok, **document})))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: list[tuple[str, ...]]) -> str:
    """Format rows as left-aligned columns of text."""
    rows = [tuple(map(printable, row)) for row in rows]  # escapes take more room
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines)


def bytes_text(count: int) -> str:
    """Format a size in bytes as "9.8 MB", in powers of ten."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
