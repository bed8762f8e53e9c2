"""The server's log: one line per request, in JSON for machines or plain text for a terminal.

A client that sends nothing valid can cause any number of other lines, from connections, uvicorn and
asyncio. Only a few of these are written; the rest is counted.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TextIO

from ditf.runtime.printable import printable

LOGGER = "ditf.serve"
FORMATS = ("auto", "json", "text")

BURST = 20
"""So many lines from one place in the code are written in PERIOD_S seconds; further ones are counted."""

PERIOD_S = 10.0


class JsonFormatter(logging.Formatter):
    """Formats a record and its `fields` as one JSON object, which escapes whatever a client sent."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record and its `fields` as text for people."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = " ".join(
            f"{name}={json.dumps(value, default=str)}"
            for name, value in getattr(record, "fields", {}).items()
        )
        text = printable(f"{when} {record.levelname.lower():7} {record.getMessage()} {fields}".rstrip())
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class BoundedHandler(logging.StreamHandler[TextIO]):
    """Writes the first BURST lines from one place in a period, and then how many were left out."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._seen: dict[tuple[str, int, str], _Seen] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it."""
        now = time.monotonic()
        self._tell(now)
        if record.name != LOGGER:
            kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
            place = (record.pathname, record.lineno, kind)
            seen = self._seen.setdefault(place, _Seen(now, record))
            seen.count += 1
            if seen.count > BURST:
                return
        super().emit(record)

    def close(self) -> None:
        """Write how many lines were left out, and close the handler."""
        self._tell(math.inf)
        super().close()

    def _tell(self, now: float) -> None:
        over = [place for place, seen in self._seen.items() if now - seen.since >= PERIOD_S]
        for place in over:
            seen = self._seen.pop(place)
            if seen.count > BURST:
                first = seen.record
                line = logging.makeLogRecord(
                    {
                        "name": first.name,
                        "levelno": first.levelno,
                        "levelname": first.levelname,
                        "msg": f"{first.getMessage().splitlines()[0]} (repeated)",
                        "fields": {"times": seen.count - BURST},
                    }
                )
                super().emit(line)


@dataclass
class _Seen:
    """The number of lines from one place since `since`, a monotonic time."""

    since: float
    record: logging.LogRecord
    count: int = 0


@contextmanager
def logging_to_stderr(style: str, level: int) -> Iterator[None]:
    """Write the server's log, and the warnings of uvicorn and asyncio, to stderr while the block runs.

    Args:
        style: "json", "text", or "auto", which is text on a terminal and JSON elsewhere.
        level: the level of the server's own lines.
    """
    if style == "auto":
        style = "text" if sys.stderr.isatty() else "json"
    handler = BoundedHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    loggers = {
        logging.getLogger(LOGGER): level,
        **{logging.getLogger(name): logging.WARNING for name in ("uvicorn", "asyncio")},
    }
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger, least in loggers.items():
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
    try:
        yield
    finally:
        handler.close()
        for logger, handlers, propagate, least in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(least)
