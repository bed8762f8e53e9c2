"""Nothing is read from the user's cache that another user can have written."""

from __future__ import annotations

import os
import stat

import pytest

from ditf.runtime.files.user_cache import cache_file, read_cache, write_cache


@pytest.fixture
def path(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_file("kernels", "engine", "GPU 0")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_it_is_the_users_alone(path, mask):
    assert read_cache(path) is None
    before = os.umask(mask)
    try:
        for content in (b"one", b"two"):
            write_cache(path, content)
            assert read_cache(path) == content
    finally:
        os.umask(before)
    assert [mode(one) for one in (path.parent.parent, path.parent, path)] == [0o700, 0o700, 0o600]
    assert list(path.parent.iterdir()) == [path]


def test_what_was_made_by_an_open_umask_is_closed(path):
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o775)
    path.write_bytes(b"of somebody in the group")
    path.chmod(0o664)
    with pytest.raises(PermissionError, match="others can write it"):
        read_cache(path)
    write_cache(path, b"mine")
    assert (read_cache(path), mode(path.parent), mode(path)) == (b"mine", 0o700, 0o600)


@pytest.mark.parametrize("level", ["file", "kind", "ditf"])
def test_what_is_somebody_elses_is_not_read(path, level):
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    write_cache(path, b"theirs")
    one = {"file": path, "kind": path.parent, "ditf": path.parent.parent}[level]
    os.chown(one, 12345, 12345)
    with pytest.raises(PermissionError, match="it is of user 12345"):
        read_cache(path)
    if level != "file":
        with pytest.raises(PermissionError, match="it is of user 12345"):
            write_cache(path, b"mine")
        assert mode(one) == 0o700


def test_links_and_fifos_are_not_read(path, tmp_path):
    write_cache(path, b"mine")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="FIFO"):
        read_cache(path)
    path.unlink()
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o755)
    for refused in (lambda: read_cache(path), lambda: write_cache(path, b"mine")):
        with pytest.raises(PermissionError, match="it is a link"):
            refused()
    assert mode(tmp_path / "elsewhere") == 0o755
