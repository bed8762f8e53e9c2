"""Whether the process that writes a file may still be running, which is checked before its files are removed.

A writing process holds a lock on its file, which ends with the process. A process id would say nothing across
containers and hosts. Where a file system cannot lock, or does not show locks to other hosts (NFS with
`nolock`), the file's age decides, by the file system's own clock because those of the hosts may differ.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Optional
from uuid import uuid4

STALE = 24 * 3600 * 10**9
"""After so many nanoseconds without a change, a file that no process is seen to lock counts as abandoned."""


def try_lock(descriptor: int) -> Optional[bool]:
    """Try to lock a file that is open for writing.

    Returns:
        True if the lock was free and is now held, False if another process holds it, and None if the file
        system cannot lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def file_system_time(folder: Path) -> int:
    """The current time by the clock of a folder's file system, in nanoseconds.

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
    """The time of the last change of a path or of anything in it, in nanoseconds. Links are not followed."""
    times = [path.lstat().st_mtime_ns]
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            try:
                times.append((Path(folder) / name).lstat().st_mtime_ns)
            except FileNotFoundError:  # another process removes it
                continue
    return max(times)
