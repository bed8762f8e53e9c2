"""A file is used only if its size and hash are as recorded."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditf.runtime.errors import BundleError
from ditf.runtime.files.hashed import HashedFile, sha256


def listed(path: Path, content: bytes) -> HashedFile:
    return HashedFile(path, len(content), hashlib.sha256(content).hexdigest(), "copy it again")


@given(size=st.sampled_from([0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]), seed=st.integers(0, 3))
def test_what_is_read_and_copied_is_the_file(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    content = (bytes(range(256)) * (size // 256 + 2))[seed : seed + size]
    (folder / "file").write_bytes(content)
    file = listed(folder / "file", content)
    file.check()
    assert file.read() == content
    file.copy(folder / "copy")
    assert (folder / "copy").read_bytes() == content
    assert sha256(folder / "copy") == file.sha256
    if size:
        with file.mapped() as mapped:
            assert isinstance(mapped, mmap.mmap)
            assert mapped[:] == content


@pytest.mark.parametrize(
    ("present", "problem"),
    [
        (b"12346", "has changed"),
        (b"1234", "is truncated: 4 bytes"),
        (b"123456", "is longer"),
        (None, "missing"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, present: bytes | None, problem: str) -> None:
    path = tmp_path / "file"
    if present is not None:
        path.write_bytes(present)
    file = listed(path, b"12345")

    def mapped() -> None:
        with file.mapped():
            pass

    for use in (file.check, file.read, lambda: file.copy(tmp_path / "copy"), mapped):
        with pytest.raises(BundleError, match=problem) as caught:
            use()
        assert caught.value.fix == "copy it again"
        (tmp_path / "copy").unlink(missing_ok=True)


def test_an_empty_file_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="is empty"), listed(tmp_path / "file", b"").mapped():
        pass


def test_a_file_system_that_maps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"12345")

    def refuse(*args: object, **keywords: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("ditf.runtime.files.hashed.mmap.mmap", refuse)
    with listed(tmp_path / "file", b"12345").mapped() as content:
        assert content == b"12345"


def test_sizes_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"54321")
    listed(tmp_path / "file", b"12345").check(contents=False)


def test_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(BundleError, match="a FIFO, not a regular file"):
        listed(tmp_path / "file", b"").read()
