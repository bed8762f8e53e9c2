"""Folders in which something is made before it takes its place, and clearing away those of killed processes.

    .NAME.partial-<boot>-<id>/lock    locked while its process lives; it names the place of what is in old/
    .NAME.partial-<boot>-<id>/new     what is being made
    .NAME.partial-<boot>-<id>/old/    what it replaces, on a file system that cannot exchange two folders in
                                      one call

`boot` tells running kernels apart. If the lock is free and its process ran under this kernel, that process is
dead. For a process of another host this is only concluded after a day (see `liveness`).
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
_LONGEST = 150  # bytes of NAME; a file name may have 255 in all
_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def stage_folder(parent: Path, name: str, home: str = ".") -> Iterator[Path]:
    """A folder in `parent` in which something is made. It is removed at the end.

    What killed processes left under the same name is cleared away first (see `clear`).

    Args:
        name: the name of what is made.
        home: the place of what is made, as seen from `parent`: "." or a folder's name. At the end, whatever
            is in old/ and missing in that place is moved back to it.

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
    """Remove the folders that killed processes left, and put back what they had moved out of its place.

    Folders that a live process may still hold are kept, and so is everything whose name has another pattern.

    Args:
        name: the name of what was made; None for any.

    Returns:
        The folders that were removed.
    """
    removed = []
    for path in _folders(parent):
        match = _STAGE.fullmatch(path.name)
        if match and name in (None, match[1]) and _clear(path, match[2]):
            removed.append(path)
    return removed


def swap(new: Path, place: Path, old: Path) -> Path | None:
    """Put a folder into its place.

    Where the system can exchange two names, this takes one call. Otherwise the former folder is moved into
    `old` first; if the process is killed in between, `clear` puts it back.

    Args:
        old: the stage's folder old/.

    Returns:
        The path where the former folder is now; None if there was none.
    """
    for last in (False, False, True):
        with suppress(FileNotFoundError):  # there is no former folder
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
                raise  # otherwise another process has just put something there
    raise AssertionError("not reached")


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one call; False if the system or the file system cannot.

    Raises:
        OSError: the exchange failed, for example because one of them does not exist.
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
    """Make a stage and hold its lock. Returns the stage and the lock's descriptor."""
    while True:
        path = parent / f".{name}.partial-{_boot()}-{uuid4().hex}"
        path.mkdir()
        descriptor = os.open(path / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        if try_lock(descriptor) is not False:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), (path / _LOCK).stat()):
                    os.write(descriptor, home.encode())
                    return path, descriptor
        os.close(descriptor)  # another process saw the lock before it was held, and cleared the stage away


def _clear(path: Path, boot: str) -> bool:
    """Clear a stage away unless its process may be alive. Returns whether it is gone."""
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
    """Put back what is missing in its place, and remove the stage. Returns whether it is gone."""
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
        return False  # what is in old/ may be the only copy
    for part in (path / NEW, path / OLD, path):  # the lock last
        shutil.rmtree(part, ignore_errors=True)
    return not path.exists()


def _stale(path: Path) -> bool:
    try:
        return file_system_time(path.parent) - newest(path) > STALE
    except OSError:
        return False


def _folders(parent: Path) -> list[Path]:
    """The folders in a folder, newest first, without links; none if it cannot be read."""
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
    """Eight digits that identify this run of the kernel."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except (OSError, ValueError):
        return uuid4().hex[:8]  # unknown, so that it never equals another process's
    return text[:8]
