"""Making text from elsewhere safe to print on a terminal, and to write into a file."""

from __future__ import annotations

import logging
import re

_UNDECODED = re.compile("[\udc80-\udcff]+")  # bytes that Python could not decode, one a character
_SURROGATE = re.compile("[\ud800-\udfff]")


def valid_unicode(text: str) -> str:
    r"""Replace the surrogates in text, which UTF-8 and many readers of JSON do not allow.

    Python decodes file names and arguments by the locale, and keeps each byte that does not fit as a
    surrogate. Those that are UTF-8 are decoded, as in a locale that is ASCII; others become escapes such as
    \udcff.
    """
    if not _SURROGATE.search(text):
        return text
    decoded = _UNDECODED.sub(
        lambda found: found[0].encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"), text
    )
    return _SURROGATE.sub(lambda one: f"\\u{ord(one[0]):04x}", decoded)


def printable(text: str) -> str:
    r"""Replace characters that a terminal would obey rather than show by escapes such as \x1b.

    File names and manifests can hold sequences that move the cursor, change what was printed before, or
    reverse the order of letters. Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    text = valid_unicode(text)
    return "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


class PrintableFormatter(logging.Formatter):
    """A formatter whose lines are safe for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
