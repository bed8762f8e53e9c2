"""The errors a user is expected to meet: the problem, then the fix, on one line."""

from __future__ import annotations


class DitfError(Exception):
    """An expected failure.

    Args:
        problem: what is wrong, naming the file, flag or value.
        fix: what the user can do about it; may be empty.

    `exit_code` is what the command line returns for it (design: 2 bad input, 3 missing component).
    """

    exit_code = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem}; {fix}" if fix else problem)


class InputError(DitfError):
    """Wrong usage: a flag, an image, a point or a checkpoint that cannot be used."""


class BundleError(DitfError):
    """A bundle that is incomplete, altered, or made by a newer ditf."""


class NewerSchema(BundleError):
    """What a newer ditf wrote; it is left as it is."""


class NoPlan(BundleError):
    """An engine that was built without a plan of the graph that is asked for."""


class GateFailed(DitfError):
    """A measured value is outside its tolerance."""

    exit_code = 1


class MissingComponent(DitfError):
    """Something that has to be installed or present first; `fix` holds the line that installs it."""

    exit_code = 3


def missing_extra(what: str, extra: str) -> MissingComponent:
    """The error for a package of an optional extra that is not installed."""
    return MissingComponent(f"{what} is not installed", f"run: pip install 'ditf[{extra}]'")
