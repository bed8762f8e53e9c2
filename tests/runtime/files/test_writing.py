"""Files appear whole or not at all, other files than regular ones are written to, and links stay links."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from ditf.runtime.files.unfinished import scratch_folder, undo_all
from ditf.runtime.files.writing import replacing, sync_tree, write_whole


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("before")
    with replacing(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "out.json"
    path.write_text("before")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_unfinished_can_be_undone_from_outside(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out.json"):
        undo_all()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_the_umask_decides(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "out.json", "text")
        with replacing(tmp_path / "out.png") as temporary:
            temporary.write_bytes(b"x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "out.json") == mode(tmp_path / "out.png") == 0o666 & ~mask


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o666, 0o400])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, bits):
    path = tmp_path / "out.json"
    path.write_text("before")
    path.chmod(bits)
    with replacing(path) as temporary:
        assert mode(temporary) & ~(bits | 0o600) == 0  # not even for a moment
        temporary.write_text("after")
    assert mode(path) == bits
    assert path.read_text() == "after"


def test_a_symbolic_link_stays(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to("second")
    (tmp_path / "second").symlink_to("deep/real")
    for text in ("made", "replaced"):
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "link").readlink().name == "second"
        assert (tmp_path / "deep" / "real").read_text() == text
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(tmp_path / "one", "text")


def test_a_fifo_is_written_to(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    write_whole(fifo, "text")
    reader.join()
    assert read == ["text"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize(("minor", "error"), [(3, None), (7, "No space left")])
def test_a_device_is_written_to(tmp_path, minor, error):
    """Nodes of the null device and the full device, in a folder of the test."""
    node = tmp_path / "node"
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        node.open("wb").close()
    except PermissionError:
        pytest.skip("device nodes need root")
    if error is None:
        write_whole(node, "text")
    else:
        with pytest.raises(OSError, match=error):
            write_whole(node, "text")
    assert stat.S_ISCHR(node.lstat().st_mode)
    assert list(tmp_path.iterdir()) == [node]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_an_own_descriptor_goes_on_where_it_is(tmp_path, name, kind):
    code = (
        "from pathlib import Path; from ditf.runtime.files.writing import write_whole\n"
        "print('before', flush=True)\n"
        f"write_whole(Path({name!r}), 'text\\n')\n"
        "print('after')\n"
    )
    with (tmp_path / "out").open("w") as file:
        out = file if kind == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    assert (done.stdout or (tmp_path / "out").read_text()) == "before\ntext\nafter\n"


def test_all_is_flushed_before_the_rename(tmp_path, monkeypatch):
    """The calls are recorded instead of done, because only a power failure would show a difference."""
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        order.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    write_whole(tmp_path / "out", "text")
    assert os.path.basename(order[0]).startswith(".ditf-")  # noqa: PTH119
    assert order[1:] == ["rename", str(tmp_path)]
    order.clear()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("x")
    sync_tree(tmp_path)
    assert order == [*(str(tmp_path / part) for part in ("deep/file", "deep", "out")), str(tmp_path)]


def test_a_scratch_folder_is_removed_whenever_a_signal_comes(monkeypatch, tmp_path):
    """A handler may raise as soon as the folder is made; undo_all may come from another thread."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make = Path.mkdir

    def interrupted(path, *arguments, **options):
        make(path, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), scratch_folder("ditf-"):
        pass
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "mkdir", make)
    with scratch_folder("ditf-") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "a").touch()
        undo_all()
        assert not list(tmp_path.iterdir())
