"""Folders in which something is made before it takes its place, and what killed processes left of them.

    .NAME.partial-<boot>-<id>/lock    held while its process lives; in it, where what is in old/ belongs
    .NAME.partial-<boot>-<id>/new     being made
    .NAME.partial-<boot>-<id>/old/    what was in its place, while it is replaced on a file system that cannot
                                      exchange two folders in one call

`boot` tells kernels apart: if the lock is free and its holder ran under this kernel, it is dead. Of another
host's it is only believed after a day (`liveness`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

from ditf.runtime.files.liveness import STALE, file_system_time, newest, try_lock
from ditf.runtime.files.reading import read_regular
from ditf.runtime.files.unfinished import undoing

NEW, OLD = "new", "old"
_LOCK = "lock"
_STAGE = re.compile(r"\.(.+)\.partial-([0-9a-f]{8})-[0-9a-f]{32}")
_LONGEST = 150  # bytes of NAME, of the 255 that a name may have
_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def stage_folder(parent: Path, name: str, home: str = ".") -> Iterator[Path]:
    """A folder in `parent` to make something in; it is removed in the end.

    What killed processes left of the same name is cleared away first (`clear`).

    Args:
        name: of what is made.
        home: where it will be, seen from `parent`: "." or a folder's name. What is in old/ and is missing
            there when all ends, goes back there.

    Raises:
        OSError: `parent` cannot be written.
    """
    name = os.fsdecode(os.fsencode(name)[:_LONGEST])
    path, descriptor = _made(parent, name, home)
    try:
        with undoing(lambda: _dissolve(path)):
            clear(parent, name)
            yield path
    finally:
        _dissolve(path)
        os.close(descriptor)


def clear(parent: Path, name: str | None = None) -> list[Path]:
    """Remove what processes that were killed left, and put back what they had moved out of its place.

    Nothing is removed that a live process may still hold, and nothing of another name's pattern or kind.

    Args:
        name: of what was made; None for any.

    Returns:
        What was removed.
    """
    removed = []
    for path in _folders(parent):
        match = _STAGE.fullmatch(path.name)
        if match and name in (None, match[1]) and _clear(path, match[2]):
            removed.append(path)
    return removed


def swap(new: Path, place: Path, old: Path) -> Path | None:
    """Put a folder into its place.

    In one call where the system can exchange two names. Otherwise what is there is moved into `old` first; a
    process that is killed in between leaves it there for `clear` to put back.

    Args:
        old: the stage's folder of this name.

    Returns:
        Where that is now which was there; None if nothing was.
    """
    for last in (False, False, True):
        with suppress(FileNotFoundError):  # nothing is there
            if exchange(new, place):
                return new
        kept: Path | None = old / place.name
        assert kept is not None
        old.mkdir(exist_ok=True)
        try:
            place.rename(kept)
        except FileNotFoundError:
            kept = None
        try:
            new.rename(place)
            return kept
        except OSError as error:
            if kept is not None:
                kept.rename(place)
            if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else somebody else's has just appeared there
    raise AssertionError("not reached")


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one call; False where the system or the file system cannot.

    Raises:
        OSError: it failed, because one of them is not there for example.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _made(parent: Path, name: str, home: str) -> tuple[Path, int]:
    """A new stage and its lock, held."""
    while True:
        path = parent / f".{name}.partial-{_boot()}-{uuid4().hex}"
        path.mkdir()
        descriptor = os.open(path / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        if try_lock(descriptor) is not False:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), (path / _LOCK).stat()):
                    os.write(descriptor, home.encode())
                    return path, descriptor
        os.close(descriptor)  # somebody saw the lock before it was held, and cleared it away


def _clear(path: Path, boot: str) -> bool:
    """Clear a stage away unless its process may live; whether it is gone."""
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return _stale(path) and _dissolve(path)
    except OSError:
        return False
    try:
        free = try_lock(descriptor)
        dead = free is True and boot == _boot()
        return (dead or (free is not False and _stale(path))) and _dissolve(path)
    finally:
        os.close(descriptor)


def _dissolve(path: Path) -> bool:
    """Put back what is missing in its place, and remove a stage; whether it is gone."""
    try:
        home = Path(os.fsdecode(read_regular(path / _LOCK, 255))).name
    except OSError:
        home = ""
    try:
        for entry in sorted((path / OLD).iterdir()):
            place = path.parent / home / entry.name
            if not os.path.lexists(place):
                entry.rename(place)
    except FileNotFoundError:  # no old/
        pass
    except OSError:
        return False  # it may be the only copy
    for part in (path / NEW, path / OLD, path):  # the lock last
        shutil.rmtree(part, ignore_errors=True)
    return not path.exists()


def _stale(path: Path) -> bool:
    try:
        return file_system_time(path.parent) - newest(path) > STALE
    except OSError:
        return False


def _folders(parent: Path) -> list[Path]:
    """Folders, not links to some, in a folder, newest first; none if it cannot be read."""
    found = []
    try:
        for path in parent.iterdir():
            with suppress(FileNotFoundError):
                status = path.lstat()
                if stat.S_ISDIR(status.st_mode):
                    found.append((status.st_mtime, path))
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True)]


@cache
def _boot() -> str:
    """Eight digits that tell this run of the kernel from others'."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except (OSError, ValueError):
        return uuid4().hex[:8]  # none is known: never equal to another process's
    return text[:8]
