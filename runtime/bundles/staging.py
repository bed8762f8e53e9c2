"""Writing a directory so that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ditf.runtime.bundles.manifest import LARGEST_MANIFEST, MANIFEST
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json
from ditf.runtime.files.stage_folder import NEW, OLD, stage_folder, swap
from ditf.runtime.files.writing import link_end, sync_folder, sync_tree

ENGINE, PICTURES = "engine.json", "index.json"
_MARKS = {
    MANIFEST: {"schema", "layer", "opset", "files", "tolerances"},
    PICTURES: {"pictures"},
}
"""Fields that show that a file is ditf's, by its name."""
ENGINE_FILES = {ENGINE, f"{ENGINE}.sig", "features.plan", "match.plan"}
"""All that a folder of an engine holds."""


@contextmanager
def staged(target: Path, marker: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` when the block ends well.

    What is at `target` is replaced whole, of a bundle its engines included; whatever goes wrong, it is kept
    as it was and the temporary folder is removed. Of a symbolic link, what it points to is replaced.
    What a killed process left is put back or removed by the next one, see `stage_folder`.

    Args:
        marker: the file that shows that `target` may be replaced, if it is ditf's: of a bundle its manifest.

    Raises:
        InputError: `target` exists without the marker, or its parent cannot be written.
    """
    place = link_end(target)
    _check_marker(target, place, marker)
    with ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            stage = stack.enter_context(stage_folder(place.parent, place.name))
            (stage / NEW).mkdir()
        except OSError as error:
            raise InputError(
                f"{target.parent} cannot be written ({error.strerror})", "choose another place"
            ) from error
        yield stage / NEW
        sync_tree(stage / NEW)
        _check_marker(target, place, marker)
        former = swap(stage / NEW, place, stage / OLD)
        if former is not None and not _replaceable(former, marker):  # somebody has just put it there
            swap(former, place, stage / "unwanted")
            _check_marker(target, place, marker)
        sync_folder(place.parent)


def check_output(target: Path, inputs: Sequence[Path] = (), marker: str = MANIFEST) -> None:
    """Reject a place that `staged` cannot or must not replace, before the work starts.

    Args:
        inputs: files and folders that the command reads.
        marker: see `staged`.

    Raises:
        InputError: the current directory or an input is in it or is it, or it exists without the marker.
    """
    try:
        str(target).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"the name {target} is not UTF-8", "choose another --output") from None
    place = link_end(target).resolve()
    held = {"the current directory": Path.cwd(), **{str(one): one.resolve() for one in inputs}}
    for what, path in held.items():
        if place in (path, *path.parents):
            is_or_holds = "is" if place == path else "holds"
            raise InputError(f"{target} {is_or_holds} {what}", "choose another --output")
    _check_marker(target, place, marker)


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


def _check_marker(target: Path, place: Path, marker: str) -> None:
    if os.path.lexists(place) and not _replaceable(place, marker):
        what = {MANIFEST: "is not a bundle", ENGINE: "holds more than an engine"}.get(marker)
        what = what or f"has no {marker} of ditf"
        raise InputError(f"{target} exists and {what}", "choose another place, or move it away")


def _replaceable(place: Path, marker: str) -> bool:
    """Whether a folder is what ditf wrote: other programs have a manifest.json too."""
    if marker == ENGINE:  # a damaged record is replaced too: the folder's name is ditf's, in a bundle
        return place.is_dir() and {path.name for path in place.iterdir()} <= ENGINE_FILES
    try:
        document = read_json(place / marker, LARGEST_MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.keys() >= _MARKS[marker]
