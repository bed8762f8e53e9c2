"""Writing a bundle, an engine or a folder of pictures so that it appears whole or not at all."""

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
from ditf.runtime.printable import valid_unicode

PICTURES = "index.json"
RECORD, FEATURES_PLAN, MATCH_PLAN = "engine.json", "features.plan", "match.plan"
_MARKS = {
    MANIFEST: {"schema", "layer", "opset", "files", "tolerances"},
    PICTURES: {"pictures"},
}
"""{file name: the fields that show that the file is from ditf}."""
ENGINE_FILES = {RECORD, f"{RECORD}.sig", FEATURES_PLAN, MATCH_PLAN}
"""The names of all files that an engine's folder may hold."""


@contextmanager
def staged(target: Path, marker: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` if the block ends without an error.

    The old `target` is then replaced as a whole, including the engines of a bundle. If anything fails, it is
    kept as it was and the temporary folder is removed. If `target` is a symbolic link, what it points to is
    replaced. The next process puts back or removes what a killed process left (see `stage_folder`).

    Args:
        marker: the name of the file that shows that `target` is from ditf and may be replaced. For a bundle
            it is the manifest.

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
        if former is not None and not _replaceable(former, marker):  # another process has just put it there
            swap(former, place, stage / "unwanted")
            _check_marker(target, place, marker)
        sync_folder(place.parent)


def check_output(target: Path, inputs: Sequence[Path] = (), marker: str = MANIFEST) -> None:
    """Reject a target that `staged` cannot or must not replace, before the work starts.

    Args:
        inputs: the files and folders that the command reads.
        marker: see `staged`.

    Raises:
        InputError: the target is or holds the current directory or an input, or it exists without the marker.
    """
    place = link_end(target).resolve()
    if valid_unicode(str(place)) != str(place):  # the libraries that write ONNX files would fail at the end
        raise InputError(f"the name {place} is not UTF-8", "choose another --output")
    held = {"the current directory": Path.cwd(), **{str(one): one.resolve() for one in inputs}}
    for what, path in held.items():
        if place in (path, *path.parents):
            is_or_holds = "is" if place == path else "holds"
            raise InputError(f"{target} {is_or_holds} {what}", "choose another --output")
    _check_marker(target, place, marker)


def check_space(target: Path, needed: int) -> None:
    """Reject a target that its file system has no room for, before the work starts.

    The old target stays until the new one is complete, so its space does not count as free.

    Args:
        needed: about how many bytes are needed.

    Raises:
        InputError: too little is free; the message gives both numbers.
    """
    folder = next(path for path in target.absolute().parents if path.is_dir())
    usage = shutil.disk_usage(folder)
    if usage.total > 0 and usage.free < needed:  # a total of 0 says nothing
        raise InputError(
            f"{target} needs about {needed / 1e6:.0f} MB and {folder} has {usage.free / 1e6:.0f} MB free",
            "free some space, or choose another --output, --precision fp16 or an earlier --layer",
        )


def _check_marker(target: Path, place: Path, marker: str) -> None:
    if os.path.lexists(place) and not _replaceable(place, marker):
        what = {MANIFEST: "is not a bundle", RECORD: "holds more than an engine"}.get(marker)
        what = what or f"has no {marker} of ditf"
        raise InputError(f"{target} exists and {what}", "choose another place, or move it away")


def _replaceable(place: Path, marker: str) -> bool:
    """Whether ditf wrote a folder. Other programs write a manifest.json too, so the fields are compared."""
    if marker == RECORD:  # a damaged record may be replaced too, inside a bundle
        return place.is_dir() and {path.name for path in place.iterdir()} <= ENGINE_FILES
    try:
        document = read_json(place / marker, LARGEST_MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.keys() >= _MARKS[marker]
