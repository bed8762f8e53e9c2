"""Text that someone else chose, made safe for a terminal."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    r"""The text with escapes, such as \x1b, in place of what a terminal would obey rather than show.

    Names of files and texts of manifests can hold sequences that move the cursor, change what was printed
    before, or reverse the order of letters. Lines and tabs stay.
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
