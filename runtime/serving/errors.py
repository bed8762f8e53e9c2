"""The errors of a request, and their HTTP statuses."""

from __future__ import annotations

from ditf.runtime.errors import DitfError, InputError


class TooLarge(InputError):
    """A body, an image or a list of points exceeds a limit (status 413)."""


class NotFound(InputError):
    """A model, a version or a bundle is not served (status 404)."""


class Overloaded(DitfError):
    """There is no room now (status 503); the client may try again after `retry_after_s`."""

    retry_after_s = 1


class DeadlineExceeded(DitfError):
    """The request waited too long and was not run (status 504)."""


class EngineError(DitfError):
    """The engine failed on this request (status 500); the log says where."""


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
