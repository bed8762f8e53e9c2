"""Opening files from elsewhere, which must be regular files of bounded size."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Union

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Union[str, Path], limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading, following symbolic links.

    Opening a FIFO waits for a writer, and reading a device may never end. The file is therefore opened
    without waiting, and `fstat` says what was opened. The path could change between a check of it and the
    opening.

    Args:
        limit: the largest accepted size in bytes, or None for any.

    Returns:
        The file, open in binary mode; the caller closes it.

    Raises:
        FileNotFoundError: the file does not exist.
        IsADirectoryError: the path is a directory.
        OSError: the file is not a regular file, or is larger than `limit`; `strerror` says which in words.
    """
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    # The file object owns its descriptor at once, so an exception from a signal handler cannot leak it.
    file = open(path, "rb", opener=lambda name, given: os.open(name, given | flags))  # noqa: SIM115
    try:
        opened = os.fstat(file.fileno())
        if not stat.S_ISREG(opened.st_mode):
            kind = _KINDS.get(stat.S_IFMT(opened.st_mode), "something else")
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
        if limit is not None and opened.st_size > limit:
            raise OSError(errno.EFBIG, f"it has {opened.st_size:,} bytes, more than {limit:,}", str(path))
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Union[str, Path], limit: int) -> bytes:
    """Read all of a regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`, or the file grew past `limit` while it was read.
    """
    with open_regular(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content
