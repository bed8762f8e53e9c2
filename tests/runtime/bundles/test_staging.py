"""A bundle appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ditf.runtime.bundles.staging import check_output, staged
from ditf.runtime.errors import InputError
from ditf.runtime.files.liveness import STALE, file_system_time
from ditf.runtime.files.stage_folder import clear, exchange


def manifest(text):
    """A manifest that marks a folder as a bundle, with a text to recognise it."""
    return json.dumps({"schema": 1, "layer": 9, "opset": 20, "files": {}, "tolerances": {}, "text": text})


def text_of(bundle):
    return json.loads((bundle / "manifest.json").read_text())["text"]


def make_bundle(path, text):
    path.mkdir()
    (path / "manifest.json").write_text(manifest(text))


def test_a_new_directory(tmp_path):
    with staged(tmp_path / "deep" / "bundle") as folder:
        (folder / "manifest.json").write_text(manifest("new"))
        assert not (tmp_path / "deep" / "bundle").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_whole(tmp_path):
    make_bundle(tmp_path / "bundle", "old")
    (tmp_path / "bundle" / "engines").mkdir()
    with staged(tmp_path / "bundle") as folder:
        (folder / "manifest.json").write_text(manifest("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert [p.name for p in (tmp_path / "bundle").iterdir()] == ["manifest.json"]
    assert text_of(tmp_path / "bundle") == "new"


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
    assert text_of(tmp_path / "bundle") == "old"


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


def old(path, days=2.0):
    """Make a file or folder old, by the file system's clock."""
    now = file_system_time(path.parent)
    for one in (path, *path.rglob("*")):
        os.utime(one, ns=(now - int(days * STALE),) * 2)


def run(code, *arguments, **options):
    """Run Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


STAGED = """
import sys
from pathlib import Path
from ditf.runtime.files.liveness import STALE, file_system_time
from ditf.runtime.files.stage_folder import clear, exchange
from ditf.runtime.bundles.staging import check_output, staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "manifest.json").write_text(NEW)
    print("working", flush=True)
    sys.stdin.read()
    print(folder.exists())
""".replace("NEW", repr(manifest("new")))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    make_bundle(tmp_path / "disk" / "real", "old")
    (tmp_path / "bundle").symlink_to("disk/real")
    with staged(tmp_path / "bundle") as folder:
        (folder / "manifest.json").write_text(manifest("new"))
    assert (tmp_path / "bundle").is_symlink()
    assert text_of(tmp_path / "disk" / "real") == "new"
    assert names(tmp_path) == ["bundle", "disk"]
    assert names(tmp_path / "disk") == ["real"]


def test_what_a_killed_process_left_is_removed_at_once(tmp_path):
    with run(STAGED, tmp_path / "bundle") as process:
        process.stdout.readline()
        process.kill()
    assert len(names(tmp_path)) == 1
    (tmp_path / ".other.partial-mine").mkdir()
    with staged(tmp_path / "bundle") as folder:
        (folder / "manifest.json").write_text(manifest("new"))
    assert names(tmp_path) == [".other.partial-mine", "bundle"]


def test_a_live_stage_is_left_alone_whoever_it_is_of(tmp_path):
    """The stage belongs to a process in another namespace, and may look old by that process's clock."""
    isolated = ["unshare", "--fork", "--pid", "--mount-proc"]
    able = subprocess.run([*isolated, "true"], capture_output=True).returncode == 0
    command = [*(isolated if able else []), sys.executable, "-c", STAGED, tmp_path / "bundle"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        (stage,) = tmp_path.iterdir()
        old(stage)
        assert clear(tmp_path) == []
        with staged(tmp_path / "bundle") as folder:
            (folder / "manifest.json").write_text(manifest("second"))
        output = process.communicate("")[0]
    assert output == "True\n"
    assert names(tmp_path) == ["bundle"]
    assert text_of(tmp_path / "bundle") == "new"


@pytest.mark.parametrize(("boot", "days", "goes"), [("0" * 8, 2.0, True), ("0" * 8, 0.9, False)])
def test_of_another_host_age_decides_beside_the_lock(tmp_path, boot, days, goes):
    stage = tmp_path / f".bundle.partial-{boot}-{'1' * 32}"
    (stage / "new").mkdir(parents=True)
    (stage / "lock").write_text(".")
    old(stage, days)
    assert clear(tmp_path) == ([stage] if goes else [])
    assert stage.exists() != goes


def test_where_locks_do_not_work_age_decides(tmp_path, monkeypatch):
    """A call that fails as on a file system without locks replaces flock."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with staged(tmp_path / "bundle") as folder:
        (folder / "manifest.json").write_text(manifest("new"))
        assert clear(tmp_path) == []
        stage = folder.parent
        old(stage)
        (folder / "being written").write_text("")
        assert clear(tmp_path) == []
    assert names(tmp_path) == ["bundle"]


KILLED = """
import os, sys
from pathlib import Path
from ditf.runtime.files import stage_folder
from ditf.runtime.files.liveness import STALE, file_system_time
from ditf.runtime.files.stage_folder import clear, exchange
from ditf.runtime.bundles.staging import check_output, staged
exchanging = sys.argv[2] == "exchange"
if not exchanging:
    stage_folder.exchange = lambda one, other: False
left = [int(sys.argv[3])]
def ending(call):
    def called(*arguments):
        result = call(*arguments)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return result
    return called
Path.rename = ending(Path.rename)
stage_folder.exchange = ending(stage_folder.exchange) if exchanging else stage_folder.exchange
with staged(Path(sys.argv[1])) as folder:
    (folder / "manifest.json").write_text(NEW)
""".replace("NEW", repr(manifest("new")))


@pytest.mark.parametrize(
    ("how", "call", "found"), [("rename", 1, "old"), ("rename", 2, "new"), ("exchange", 1, "new")]
)
@pytest.mark.parametrize("then", ["fails", "succeeds"])
def test_killed_as_it_is_replaced(tmp_path, how, call, found, then):
    """After a kill at any rename the bundle is there, or the next export brings it back even if it fails."""
    make_bundle(tmp_path / "bundle", "old")
    with run(KILLED, tmp_path / "bundle", how, call) as process:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "bundle").exists() == (found == "new" or call != 1)

    def export():
        with staged(tmp_path / "bundle") as folder:
            assert text_of(tmp_path / "bundle") == found
            if then == "fails":
                raise RuntimeError
            (folder / "manifest.json").write_text(manifest("second"))

    if then == "fails":
        with pytest.raises(RuntimeError):
            export()
    else:
        export()
    assert names(tmp_path) == ["bundle"]
    assert text_of(tmp_path / "bundle") == (found if then == "fails" else "second")


def test_names_like_a_stage_of_other_kinds_are_left_alone(tmp_path):
    name = f".bundle.partial-{'0' * 8}-{'1' * 32}"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    old(tmp_path / "folder")
    (tmp_path / name).symlink_to("folder")
    (tmp_path / f"{name[:-1]}2").write_text("a file")
    assert clear(tmp_path) == []
    assert len(names(tmp_path)) == 3


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    def export():
        with staged(tmp_path / "bundle") as folder:
            (folder / "manifest.json").write_text(manifest("new"))
            (tmp_path / "bundle").mkdir()
            (tmp_path / "bundle" / "precious").write_text("x")

    with pytest.raises(InputError, match="is not a bundle"):
        export()
    assert names(tmp_path) == ["bundle"]
    assert names(tmp_path / "bundle") == ["precious"]


def test_a_long_name(tmp_path):
    target = tmp_path / ("n" * 255)
    for text in ("first", "second"):
        with staged(target) as folder:
            (folder / "manifest.json").write_text(manifest(text))
    assert names(tmp_path) == [target.name]


def test_exchange_says_where_it_cannot(tmp_path):
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "two")


def test_places_that_hold_what_is_in_use(tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    make_bundle(bundle, "old")
    (bundle / "engines").mkdir()
    monkeypatch.chdir(bundle / "engines")
    for place in ("/", ".", "..", bundle, tmp_path):
        with pytest.raises(InputError, match=r"(is|holds) the current directory; choose another --output"):
            check_output(Path(place))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("bundle")
    for place in ("bundle", "link"):
        for one in (bundle, bundle / "engines", tmp_path / "link" / "manifest.json"):
            with pytest.raises(InputError, match=f"{place} (is|holds) .*; choose another"):
                check_output(Path(place), [one])
    check_output(bundle, [tmp_path])
    with pytest.raises(InputError, match="is not UTF-8; choose another --output"):
        check_output(Path(os.fsdecode(b"o\xff")))
    (tmp_path / os.fsdecode(b"here\xff")).mkdir()
    monkeypatch.chdir(tmp_path / os.fsdecode(b"here\xff"))
    with pytest.raises(InputError, match="is not UTF-8; choose another --output"):
        check_output(Path("o"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="exists and is not a bundle"):
        check_output(bundle / "engines")


def test_a_bundle_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """The calls are recorded, because only a power failure would show a difference."""
    order = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: order.append(Path(f"/proc/self/fd/{descriptor}").readlink())
    )
    make_bundle(tmp_path / "bundle", "old")
    with staged(tmp_path / "bundle") as folder:
        (folder / "manifest.json").write_text(manifest("new"))
    assert order == [folder / "manifest.json", folder, tmp_path]


@pytest.mark.parametrize(
    "content",
    ['{"manifest_version": 3, "name": "my extension"}', "[]", "not JSON", '{"schema": 1, "files": {}}', ""],
)
def test_a_folder_of_another_program_is_not_replaced(tmp_path, content):
    """Web applications and browser extensions also have a manifest.json."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text(content)
    (mine / "background.js").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a bundle"):
        check_output(mine)
    with pytest.raises(InputError, match="exists and is not a bundle"), staged(mine):
        pass
    assert (mine / "background.js").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_hidden_folders_that_only_look_like_leftovers_stay(tmp_path):
    for name in (".out.partial-2024", ".out.old-3", ".other.old-7"):
        (tmp_path / name / "thesis").mkdir(parents=True)
        for path in (tmp_path / name, tmp_path / name / "thesis"):
            os.utime(path, (0, 0))
    assert clear(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.old-7",
        ".out.old-3",
        ".out.partial-2024",
    ]
