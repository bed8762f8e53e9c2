"""JSON files from elsewhere must be regular and bounded; anything that is not JSON raises one error."""

import json
import os
from pathlib import Path

import pytest

from ditf.runtime.files.json_file import json_text, read_json


def test_reads_a_value(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": ["\u00e9", 1]}', "utf-8")
    assert read_json(tmp_path / "a.json", 100) == {"name": ["\u00e9", 1]}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011  in the parser's words
        read_json(tmp_path / "a.json", 1 << 20)


def test_large_files_and_fifos_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(OSError, match="more than 8"):
        read_json(tmp_path / "a.json", 8)
    with pytest.raises(OSError, match="FIFO"):
        read_json(tmp_path / "fifo.json", 8)


def test_what_is_written_is_json_for_every_reader() -> None:
    """A lone surrogate, as Python keeps for a byte of a file name, is no character that UTF-8 can hold."""
    name = os.fsdecode(b"bad\xff")
    text = json_text({name: [name, "é", 1.5, None, True]})
    assert text.isascii()
    assert text.endswith("}\n")
    assert json.loads(text) == {"bad\\udcff": ["bad\\udcff", "é", 1.5, None, True]}
