"""What has to be undone if the process must end while it is at work.

An exception unwinds through `with` blocks and needs none of this. A process whose main thread is inside
native code cannot raise one; whoever ends it then calls `undo_all` first.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_undo: dict[int, Callable[[], object]] = {}


def register(undo: Callable[[], object]) -> None:
    """Have something undone if the process must end: by a function that does no harm when all is done."""
    _undo[id(undo)] = undo


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Work that `undo` takes back; the block itself has to clean up when it ends in any other way.

    Args:
        undo: may be called from another thread, while the block still runs.
    """
    register(undo)
    try:
        yield
    finally:
        _undo.pop(id(undo), None)


def undo_all() -> None:
    """Undo what is unfinished, the latest first."""
    for undo in reversed(list(_undo.values())):
        with suppress(OSError):
            undo()


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder that is removed in the end."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix) as name,
        undoing(lambda: shutil.rmtree(name, ignore_errors=True)),
    ):
        yield Path(name)
