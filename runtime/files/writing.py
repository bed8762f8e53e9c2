"""Writing files so that they appear whole or not at all.

A file is written beside its place, flushed to the disk and renamed. A reader therefore never sees half of it,
and neither a killed process nor a power failure leaves half of it under its name.

- The umask decides the permissions of a new file; a file that replaces another gets that file's permissions.
- A symbolic link stays, and what it points to is written.
- Anything but a regular file (a FIFO, a device, /dev/stdout, /proc/self/fd/N) is written to and never
replaced.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Union
from uuid import uuid4

from ditf.runtime.files.unfinished import scratch_folder, undoing

_DESCRIPTOR = re.compile(r"/proc/(\d+)/(?:task/\d+/)?fd/(\d+)")
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # raised by file systems that cannot sync


def write_whole(path: Path, content: Union[str, bytes]) -> None:
    """Write a file as a whole; text is encoded as UTF-8.

    Raises:
        OSError: the file cannot be written; a former file is kept.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file with the same suffix that becomes `path` if the block ends without an error.

    The block opens and writes the existing temporary file; it must not replace it. If the block fails, the
    temporary file is removed and `path` stays as it was.

    Raises:
        OSError: the file cannot be written.
    """
    place = link_end(path)
    if written_through(place):
        with scratch_folder("ditf-") as folder:
            temporary = folder / f"output{path.suffix}"
            temporary.touch()
            yield temporary
            with temporary.open("rb") as source, _opened_through(place) as sink:
                shutil.copyfileobj(source, sink)
        return
    temporary = place.with_name(f".ditf-{uuid4().hex}{place.suffix}")
    with created(temporary, place) as file:
        yield temporary
        publish(file, temporary, place)


@contextmanager
def created(path: Path, like: Path | None = None) -> Iterator[BinaryIO]:
    """A new file, which is removed at the end of the block unless it was renamed.

    Args:
        like: the file that will be replaced; if it exists, the new file gets its permissions.

    Raises:
        OSError: the file exists, or cannot be created.
    """
    mode = None
    if like is not None:
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(like.stat().st_mode) & 0o777
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC

    def remove() -> None:
        path.unlink(missing_ok=True)

    with undoing(remove):
        # At no time may more users read the file than at the end.
        descriptor = os.open(path, flags, 0o666 if mode is None else mode | 0o600)
        try:
            with os.fdopen(descriptor, "r+b") as file:
                yield file
                if mode is not None:
                    os.fchmod(descriptor, mode)
        finally:
            remove()


def publish(file: BinaryIO, temporary: Path, place: Path) -> None:
    """Flush a file that `created` made to the disk, and rename it to its place."""
    file.flush()
    _fsync(file.fileno())
    temporary.replace(place)
    sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk if its file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # the folder can be written but not read
        return
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and all of its content to the disk."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(Path(path) / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(path))


def link_end(path: Path) -> Path:
    """Follow the symbolic links of a path to their end, which need not exist. /proc counts as an end.

    Raises:
        OSError: the links form a circle.
    """
    place = path
    for _ in range(40):
        if place.name in ("", ".."):
            return place.resolve()
        place = place.parent.resolve() / place.name
        if place.is_relative_to("/proc") or not place.is_symlink():
            return place
        place = place.parent / place.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def written_through(place: Path) -> bool:
    """Whether the file at a `link_end` must be written to, because it cannot be replaced."""
    if place.is_relative_to("/proc"):
        return True
    try:
        return not stat.S_ISREG(place.lstat().st_mode)
    except FileNotFoundError:
        return False


def _opened_through(place: Path) -> BinaryIO:
    """Open a file to write to it in place. A descriptor of this process continues at its position."""
    own = _DESCRIPTOR.fullmatch(str(place))
    if own is not None and int(own[1]) == os.getpid():
        return os.fdopen(os.dup(int(own[2])), "wb")
    return os.fdopen(os.open(place, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY), "wb")


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
