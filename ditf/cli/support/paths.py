"""Checks of the paths that a verb writes to, before its work starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from ditf.cli.support.state import state
from ditf.runtime.errors import InputError, missing_extra
from ditf.runtime.files.writing import link_end, written_through


def check_writable(*paths: Optional[Path], inputs: Sequence[Path] = ()) -> None:
    """Reject outputs that cannot be written, before the work starts.

    Args:
        paths: output files; None for those that were not asked for.
        inputs: files and directories that the command reads.

    Raises:
        InputError: an output is a directory, lies in a missing or read-only folder, is or lies in an input,
            or is named twice.
    """
    outputs = [path for path in paths if path is not None]
    signers = () if state.trust.signers is None else (state.trust.signers,)
    taken = {path.resolve() for path in (*inputs, *signers)}
    for path in outputs:
        check_outside(path, list(taken))
        taken.add(path.resolve())
        if path.is_dir():
            raise InputError(f"{path} is a directory", "name a file")
        if path.name == "-":
            raise InputError("'-' is not supported here", "name a file; results are on stdout already")
        place = link_end(path)
        if not place.parent.is_dir():
            raise InputError(f"{place.parent} is not a directory", "make it first")
        through = written_through(place)
        if not os.access(place if through or place.exists() else place.parent, os.W_OK):
            raise InputError(f"{place} cannot be written", "choose another path")
        if not through and not os.access(place.parent, os.W_OK):
            raise InputError(f"{place.parent} cannot be written", "choose another path")


def check_outside(path: Path, inputs: Sequence[Path]) -> None:
    """Reject an output that is, or lies in, something that the command reads.

    Raises:
        InputError: it would be overwritten.
    """
    resolved = path.resolve()
    if {resolved, *resolved.parents} & {one.resolve() for one in inputs}:
        raise InputError(
            f"writing {path} would overwrite what this command works with", "choose another path"
        )


def check_picture(path: Path, extra: str) -> None:
    """Reject a --plot that cannot be drawn, before the work starts.

    Args:
        extra: the extra of ditf that installs matplotlib.

    Raises:
        InputError: the format is not supported.
        MissingComponent: matplotlib is not installed.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path} is no PNG, SVG or PDF", f"for example --plot {path.stem}.png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", extra) from None
