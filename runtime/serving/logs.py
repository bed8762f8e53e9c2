"""One line a request: JSON for machines, plain text for a terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from ditf.runtime.printable import printable

LOGGER = "ditf.serve"
FORMATS = ("auto", "json", "text")


class JsonFormatter(logging.Formatter):
    """A record and its `fields` as one JSON object; whatever a client sent is escaped."""

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
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = " ".join(
            f"{name}={json.dumps(value, default=str)}"
            for name, value in getattr(record, "fields", {}).items()
        )
        text = printable(f"{when} {record.levelname.lower():7} {record.getMessage()} {fields}".rstrip())
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


@contextmanager
def logging_to_stderr(style: str, level: int) -> Iterator[None]:
    """The server's log on stderr, and uvicorn's warnings with it.

    Args:
        style: "json", "text", or "auto": text on a terminal.
        level: of the server's own lines.
    """
    if style == "auto":
        style = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    loggers = {logging.getLogger(LOGGER): level, logging.getLogger("uvicorn"): logging.WARNING}
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger, least in loggers.items():
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
    try:
        yield
    finally:
        for logger, handlers, propagate, least in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(least)
