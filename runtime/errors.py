"""The errors that a user may meet. Each names the problem and then the fix, on one line."""

from __future__ import annotations


class DitfError(Exception):
    """An expected failure.

    Args:
        problem: what is wrong, naming the file, flag or value.
        fix: what the user can do about it; may be empty.

    Attributes:
        exit_code: what the command line exits with: 1 for a failed gate, 2 for bad input, 3 for a missing
            component.
    """

    exit_code = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem}; {fix}" if fix else problem)


class InputError(DitfError):
    """A flag, an image, a point or a checkpoint cannot be used."""


class BundleError(DitfError):
    """A bundle is incomplete, altered, or made by a newer ditf."""


class NewerSchema(BundleError):
    """A newer ditf wrote this; it is left as it is."""


class NoPlan(BundleError):
    """The engine was built without a plan of the graph that is asked for."""


class GateFailed(DitfError):
    """A measured value is outside its tolerance."""

    exit_code = 1


class MissingComponent(DitfError):
    """Something must be installed first; `fix` holds the line that installs it."""

    exit_code = 3


def missing_extra(what: str, extra: str) -> MissingComponent:
    """The error for a package that is not installed and that an optional extra brings."""
    return MissingComponent(f"{what} is not installed", f"run: pip install 'ditf[{extra}]'")
