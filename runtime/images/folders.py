"""Listing the image files of a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from ditf.runtime.errors import InputError

_UNDECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow knows but whose pixels it does not read, or not without another program."""

_NAMED = 4  # of the files that are skipped, so many are named


def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the files that Pillow and its registered plugins read."""
    known = Image.registered_extensions()
    return frozenset(
        suffix
        for suffix, kind in known.items()
        if (kind in Image.OPEN or kind == "MPO") and kind not in _UNDECODED  # JPEG's reader opens MPO
    )


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name. `skipped_files` names the others.

    Raises:
        InputError: `folder` is not a folder, or holds no images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory of images")
    return _images(folder, folder.iterdir())


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder and of all folders below it, sorted. `skipped_files` names the others.

    Raises:
        InputError: there are no images.
    """
    return _images(folder, folder.rglob("*"))


def skipped_files(folder: Path, images: Iterable[Path], below: bool = False) -> str | None:
    """Name the files of a folder that are no images, in one line; None if there are none.

    Hidden files do not count.

    Args:
        images: the result of `list_images` or `find_images`.
        below: whether the folders below were searched too. Otherwise they are named as well.
    """
    taken = set(images)
    others = sorted(
        path.relative_to(folder).as_posix() + "/" * path.is_dir()
        for path in (folder.rglob("*") if below else folder.iterdir())
        if path not in taken and not path.name.startswith(".") and not (below and path.is_dir())
    )
    if not others:
        return None
    more = f" and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
    return f"{folder}: skipped, because they are no image files: {', '.join(others[:_NAMED])}{more}"


def _images(folder: Path, paths: Iterable[Path]) -> list[Path]:
    suffixes = image_suffixes()
    images = sorted(path for path in paths if path.suffix.lower() in suffixes and path.is_file())
    if not images:
        raise InputError(f"{folder} holds no images", f"it needs one of {', '.join(sorted(suffixes))}")
    return images
