"""Characters that a terminal would obey are escaped."""

from __future__ import annotations

import io
import logging

from hypothesis import given
from hypothesis import strategies as st

from ditf.runtime.printable import PrintableFormatter, printable


@given(st.text())
def test_only_what_a_terminal_shows_is_left(text: str) -> None:
    shown = printable(text)
    assert all(one.isprintable() or one in "\n\t" for one in shown)
    if all(one.isprintable() or one in "\n\t" for one in text):
        assert shown == text


def test_escapes_are_readable() -> None:
    assert printable("a\x1b[2Jb\x9b1mc\u202ed\r\udcffé 猫\n\t") == (
        "a\\x1b[2Jb\\x9b1mc\\u202ed\\r\\udcffé 猫\n\t"
    )


def test_log_lines() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    logger = logging.Logger("ditf.test")
    logger.addHandler(handler)
    logger.warning("%s", "\x1b]0;title\x07")
    assert stream.getvalue() == "ditf.test: \\x1b]0;title\\x07\n"
