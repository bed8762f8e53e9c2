"""Writing a directory so that it is there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ditf.runtime.errors import InputError
from ditf.runtime.manifest import NAME as MANIFEST

_STAGED = re.compile(r"\.(.+)\.(?:partial|old)-(\d+)")


@contextmanager
def staged(target: Path, marker: str = MANIFEST) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its place when the block ends well.

    What is at `target` is replaced whole, of a bundle its engines included; whatever goes wrong, it is
    kept as it was and the temporary directory is removed. What a killed process left is removed by
    the next one.

    Args:
        marker: the file that shows that `target` may be replaced: of a bundle its manifest.

    Raises:
        InputError: `target` exists without the marker, or its parent cannot be written.
    """
    if target.exists() and not (target / marker).is_file():
        what = "is not a bundle" if marker == MANIFEST else f"has no {marker}"
        raise InputError(f"{target} exists and {what}", "choose another place, or move it away")
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        temporary.mkdir()
    except OSError as error:
        raise InputError(
            f"{target.parent} cannot be written ({error.strerror})", "choose another place"
        ) from error
    try:
        yield temporary
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_space(target: Path, needed: int) -> None:
    """Reject a directory that its file system has no room for, before the work starts.

    What is at `target` stays until the new one is complete: its space does not count as free.

    Args:
        needed: bytes, about.

    Raises:
        InputError: says what is free and what is needed.
    """
    folder = next(path for path in target.absolute().parents if path.is_dir())
    usage = shutil.disk_usage(folder)
    if usage.total > 0 and usage.free < needed:  # a file system of no size is none: writing will say so
        raise InputError(
            f"{target} needs about {needed / 1e6:.0f} MB and {folder} has {usage.free / 1e6:.0f} MB free",
            "free some space, or choose another --output, --precision fp16 or an earlier --layer",
        )


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def abandoned(folder: Path) -> list[Path]:
    """What processes that were killed while they wrote into a folder left behind."""
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    return [path for path in inside if (match := _STAGED.fullmatch(path.name)) and not _alive(int(match[2]))]


def _remove_stale(target: Path) -> None:
    """Remove what exports of `target` that were killed left behind."""
    for path in abandoned(target.parent):
        if path.name.startswith(f".{target.name}."):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's process
    return True
