"""SIGTERM ends a command at once and leaves nothing half-written, whatever the main thread does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, Optional

from ditf.runtime.files.unfinished import undo_all

EXIT_CODE = 128 + signal.SIGTERM
MESSAGE = "terminated; nothing was left half-written"

_NOTICED = 1.0  # seconds in which the main thread should return to the interpreter and run the handler
_UNWOUND = 5.0  # seconds for it to remove temporary files and to end a Ray cluster


class Terminated(BaseException):
    """Raised on SIGTERM; it unwinds the stack, so that temporary files are removed."""


@contextmanager
def terminable(forced: bool = True) -> Iterator[None]:
    """SIGTERM raises `Terminated` in the block, which runs in the main thread.

    Args:
        forced: end the process if unwinding takes too long. Python runs a signal handler only when the main
            thread is back in the interpreter, and a native call may take minutes; an exception that the
            handler raises inside a callback or a finaliser is lost. A watching thread ends the process
            instead, as long as native code does not hold the interpreter's lock.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    unwinding, over = threading.Event(), threading.Event()
    report = sys.unraisablehook

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        if forced and unraisable.exc_type is Terminated:
            _end()
        report(unraisable)

    def terminate(number: int, frame: Optional[FrameType]) -> NoReturn:
        for one in handlers:
            signal.signal(one, signal.SIG_IGN)  # a second one would interrupt the cleaning up
        unwinding.set()
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = lost
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = -1
    if forced:
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        watch = threading.Thread(target=_watch, args=(reading, unwinding, over), daemon=True)
        watch.start()
    try:
        yield
    finally:
        over.set()
        if forced:
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        os.close(writing)  # which ends the thread
        if forced:
            watch.join()
        os.close(reading)
        sys.unraisablehook = report
        for number, handler in handlers.items():
            if handler is not None:  # else it was not set from Python
                signal.signal(number, handler)


def exit_now() -> NoReturn:
    """Undo unfinished writes and end the process, without waiting for anything else."""
    undo_all()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(EXIT_CODE)


def _end() -> NoReturn:
    with suppress(OSError):
        os.write(2, f"error: {MESSAGE}\n".encode())
    exit_now()


def _watch(reading: int, unwinding: threading.Event, over: threading.Event) -> None:
    """Wait for SIGTERM, and end the process if the main thread does not."""
    while number := os.read(reading, 1):
        if number[0] == signal.SIGTERM and not over.wait(_NOTICED):
            if unwinding.is_set() and over.wait(_UNWOUND):
                return
            _end()


def _forget() -> None:
    """Unset the wakeup descriptor in a child process, which the parent's signals do not concern."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
