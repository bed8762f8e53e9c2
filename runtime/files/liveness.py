"""Whether whoever writes a file may still be at work: asked before anything that a process left is removed.

A process that writes holds a lock on its file, which ends with the process. A process id says nothing across
containers and hosts. Where a file system cannot lock, or forgets to tell other hosts (NFS with `nolock`), age
decides: by the file system's own clock, since those of the hosts may differ.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Optional
from uuid import uuid4

STALE = 24 * 3600 * 10**9
"""Nanoseconds without a change after which a file that nobody is seen to hold is taken for abandoned."""


def try_lock(descriptor: int) -> Optional[bool]:
    """Take the lock of an open file, which must be open for writing.

    Returns:
        Whether it was free; None where the file system cannot say.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def file_system_time(folder: Path) -> int:
    """Now, by the clock of a folder's file system, in nanoseconds.

    Raises:
        OSError: the folder cannot be written.
    """
    probe = folder / f".ditf-clock-{uuid4().hex}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def newest(path: Path) -> int:
    """The last change of a path and of all that is in it, in nanoseconds; links are not followed."""
    times = [path.lstat().st_mtime_ns]
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            try:
                times.append((Path(folder) / name).lstat().st_mtime_ns)
            except FileNotFoundError:  # somebody removes it
                continue
    return max(times)
