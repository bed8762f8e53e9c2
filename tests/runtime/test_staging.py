"""A bundle is there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ditf.runtime.errors import InputError
from ditf.runtime.staging import staged


def make_bundle(path, text):
    path.mkdir()
    (path / "manifest.json").write_text(text)


def test_a_new_directory(tmp_path):
    with staged(tmp_path / "deep" / "bundle") as folder:
        (folder / "manifest.json").write_text("new")
        assert not (tmp_path / "deep" / "bundle").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_whole(tmp_path):
    make_bundle(tmp_path / "bundle", "old")
    (tmp_path / "bundle" / "engines").mkdir()
    with staged(tmp_path / "bundle") as folder:
        (folder / "manifest.json").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert [p.name for p in (tmp_path / "bundle").iterdir()] == ["manifest.json"]
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    make_bundle(tmp_path / "bundle", "old")

    def fail():
        with staged(tmp_path / "bundle") as folder:
            (folder / "half").write_text("written")
            raise error

    with pytest.raises(error):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "folder", "empty"])
def test_anything_else_is_not_touched(tmp_path, kind):
    target = tmp_path / "bundle"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "precious").write_text("x")
    with pytest.raises(InputError, match="exists and is not a bundle"), staged(target):
        pass
    assert target.exists()


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"), staged(tmp_path / "file" / "bundle"):
        pass


def test_what_a_killed_export_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = tmp_path / f".bundle.partial-{dead.pid}"
    alive = tmp_path / f".bundle.partial-{os.getppid()}"
    other = tmp_path / ".other.partial-1"
    for path in (stale, alive, other):
        path.mkdir()
    with staged(tmp_path / "bundle") as folder:
        (folder / "manifest.json").write_text("new")
    assert not stale.exists()
    assert alive.exists()
    assert other.exists()
