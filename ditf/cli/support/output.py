"""What a verb prints and writes: lines for people, results, tables, and the --json document."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Optional

from ditf.cli.support.state import state
from ditf.runtime.files.writing import write_whole
from ditf.runtime.printable import printable

SCHEMA = 1  # of every --json document


def tell(line: str) -> None:
    """A line for people, on stderr, whatever --quiet says."""
    print(printable(line), file=sys.stderr, flush=True)


def say(line: str) -> None:
    """A line for people, on stderr, unless --quiet."""
    if not state.quiet:
        tell(line)


def show(text: str) -> None:
    """A result, on stdout. A reader that has gone, as in `| head`, ends the output and nothing else."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(path: Optional[Path], document: dict[str, Any], ok: bool = True) -> None:
    """Write a result's JSON twin: `document` with "schema" and "ok"."""
    if path is not None:
        whole = _finite({"schema": SCHEMA, "ok": ok, **document})
        text = json.dumps(whole, indent=2, allow_nan=False) + "\n"
        write_whole(path, text)


def _finite(value: Any) -> Any:
    """The same document with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: list[tuple[str, ...]]) -> str:
    """Left-aligned columns of plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines)


def bytes_text(count: int) -> str:
    """A size for people, "9.8 MB"; powers of ten."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
