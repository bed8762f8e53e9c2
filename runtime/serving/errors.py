"""What a request can end in, and the HTTP status that says so."""

from __future__ import annotations

from ditf.runtime.errors import DitfError, InputError


class TooLarge(InputError):
    """A body, an image or a list of points beyond a limit: 413."""


class NotFound(InputError):
    """A model, a version or a bundle that is not served: 404."""


class Overloaded(DitfError):
    """No room now: 503, to be tried again after `retry_after_s`."""

    retry_after_s = 1


class DeadlineExceeded(DitfError):
    """It waited too long and was not run: 504."""


class EngineError(DitfError):
    """The engine failed on this request; the log says where: 500."""


def status_of(error: DitfError) -> int:
    """The HTTP status of an expected failure."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return 500


_STATUS: tuple[tuple[type[DitfError], int], ...] = (
    (TooLarge, 413),
    (NotFound, 404),
    (Overloaded, 503),
    (DeadlineExceeded, 504),
    (EngineError, 500),
    (InputError, 400),
)
