"""Undoing unfinished work when the process must end without unwinding.

An exception unwinds through `with` blocks and needs nothing from here. A process whose main thread is inside
native code cannot raise one, so `undo_all` is called before such a process ends.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

_undo: dict[int, Callable[[], object]] = {}


def register(undo: Callable[[], object]) -> None:
    """Register a function that undoes some work. It must do no harm if the work is already finished."""
    _undo[id(undo)] = undo


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Register `undo` while the block runs. The block itself cleans up when it ends in any other way.

    Args:
        undo: undoes the work; it may be called from another thread while the block still runs.
    """
    register(undo)
    try:
        yield
    finally:
        _undo.pop(id(undo), None)


def undo_all() -> None:
    """Undo all unfinished work, the latest first."""
    for undo in reversed(list(_undo.values())):
        with suppress(OSError):
            undo()


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder that is removed at the end of the block. Only this user can read it."""
    path = Path(tempfile.gettempdir()) / f"{prefix}{uuid4().hex}"

    def remove() -> None:
        shutil.rmtree(path, ignore_errors=True)

    with undoing(remove):  # before the folder is there: a signal may raise an exception at any point
        try:
            path.mkdir(mode=0o700)
            yield path
        finally:
            remove()
