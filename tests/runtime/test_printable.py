"""Characters that a terminal would obey are escaped."""

from __future__ import annotations

import io
import logging
import os

from hypothesis import given
from hypothesis import strategies as st

from ditf.runtime.printable import PrintableFormatter, printable, valid_unicode


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


@given(st.text(st.characters(codec=None)))
def test_valid_text_is_kept_and_the_rest_becomes_valid(text: str) -> None:
    assert valid_unicode(text).encode("utf-8")[:0] == b""
    if not any("\ud800" <= one <= "\udfff" for one in text):
        assert valid_unicode(text) == text


def test_bytes_that_the_locale_could_not_decode() -> None:
    name = "ü日".encode().decode("ascii", "surrogateescape")
    assert valid_unicode(f"{name}/a") == printable(f"{name}/a") == "ü日/a"
    assert valid_unicode(os.fsdecode(b"\xc3\xbc\xff\xfe.png")) == "ü\\udcff\\udcfe.png"
    assert valid_unicode("\ud800") == "\\ud800"


def test_log_lines() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    logger = logging.Logger("ditf.test")
    logger.addHandler(handler)
    logger.warning("%s", "\x1b]0;title\x07")
    assert stream.getvalue() == "ditf.test: \\x1b]0;title\\x07\n"
