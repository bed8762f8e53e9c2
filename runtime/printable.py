"""Making text from elsewhere safe to print on a terminal."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    r"""Replace characters that a terminal would obey rather than show by escapes such as \x1b.

    File names and manifests can hold sequences that move the cursor, change what was printed before, or
    reverse the order of letters. Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


class PrintableFormatter(logging.Formatter):
    """A formatter whose lines are safe for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
