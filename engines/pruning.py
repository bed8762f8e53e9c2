"""`ditf engines prune`: removing engines that are stale or damaged, and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ditf.runtime.backends.engine_records import ENGINES_FOLDER, read_record, verify_plans
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.staging import ENGINE_FILES
from ditf.runtime.errors import BundleError, InputError, NewerSchema
from ditf.runtime.files.stage_folder import clear

_KEY = re.compile(r"tensorrt(-rtx)?-\d[\w.]*-.+-b[\d-]+-[0-9a-f]{8}")  # as `engine_key` names engines


def prune(bundle: Bundle, folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Remove stale engines, damaged engines, and the remains of builds that were killed.

    Returns:
        The removed folders, each with the reason. Links, folders that hold anything but an engine's files,
        and engines that a newer ditf made are left alone.
    """
    check_own(bundle)
    left = [(path, "left by a build that was killed") for path in clear(bundle.path / ENGINES_FOLDER)]
    removed = []
    for folder in folders:
        if not _engine_alone(folder):
            continue
        try:
            record = read_record(folder, bundle.trust)
            verify_plans(folder, record)
            why = record.stale(bundle)
        except NewerSchema:
            continue
        except BundleError as error:
            why = error.problem
        if why:
            removed.append((folder, why))
    for folder, _ in removed:
        shutil.rmtree(folder)
    return [*left, *removed]


def check_own(bundle: Bundle) -> None:
    """Refuse an engines/ that is a link: a received bundle could point it outside of itself."""
    if (bundle.path / ENGINES_FOLDER).is_symlink():
        raise InputError(f"{bundle.path / ENGINES_FOLDER} is a link", "put a folder in its place")


def _engine_alone(folder: Path) -> bool:
    """Whether a folder has an engine's name and holds only files that `build` writes."""
    if folder.is_symlink() or not _KEY.fullmatch(folder.name):
        return False
    inside = list(folder.iterdir())
    return all(path.name in ENGINE_FILES and path.is_file() and not path.is_symlink() for path in inside)
