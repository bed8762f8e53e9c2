"""SIGTERM, SIGHUP and SIGINT end a command at once and leave nothing half-written.

That holds whatever the main thread does. Python runs a signal handler only when the main thread is back in
the interpreter, and a native call may take minutes; an exception that the handler raises inside a callback or
a finaliser is lost. A watching thread then ends the process instead, as soon as no native code holds the
interpreter's lock.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, Optional

from ditf.runtime.files.unfinished import undo_all

_WORDS = {
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal was closed",
    signal.SIGINT: "interrupted",
}
_NOTICED = 0.4  # seconds in which the main thread should return to the interpreter and run the handler
_UNWOUND = 5.0  # seconds for it to remove temporary files and to end a Ray cluster


class Terminated(BaseException):
    """Raised on SIGTERM and SIGHUP; it unwinds the stack, so that temporary files are removed.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = number


def exit_code(number: int) -> int:
    """The exit code of a command that a signal has ended."""
    return 128 + number


def message(number: int) -> str:
    """What a command says that a signal has ended."""
    return f"{_WORDS[signal.Signals(number)]}; nothing was left half-written"


@contextmanager
def terminable(forced: bool = True) -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Terminated` in the block, and SIGINT raises KeyboardInterrupt.

    The block runs in the main thread. SIGHUP and SIGINT stay ignored if they are ignored already, as
    SIGHUP is under nohup.

    Args:
        forced: end the process if unwinding takes too long. Without it only SIGTERM is handled, for work that
            ends itself on the other signals.
    """
    numbers = [signal.SIGTERM]
    if forced:
        numbers += [one for one in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(one) != signal.SIG_IGN]
    handlers = {number: signal.getsignal(number) for number in (*numbers, signal.SIGINT)}
    unwinding, over = threading.Event(), threading.Event()
    report = sys.unraisablehook

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        if forced and unwinding.is_set() and unraisable.exc_type in (Terminated, KeyboardInterrupt):
            _end(ended_by[0])
        report(unraisable)

    ended_by: list[int] = []

    def terminate(number: int, frame: Optional[FrameType]) -> NoReturn:
        for one in handlers:
            signal.signal(one, signal.SIG_IGN)  # a second one would interrupt the cleaning up
        ended_by.append(number)
        unwinding.set()
        if number == signal.SIGHUP:
            _leave_terminal()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(number)

    for number in numbers:
        signal.signal(number, terminate)
    sys.unraisablehook = lost
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = -1
    if forced:
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        watch = threading.Thread(target=_watch, args=(reading, set(numbers), unwinding, over), daemon=True)
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


def exit_now(code: int) -> NoReturn:
    """Undo unfinished writes and end the process, without waiting for anything else."""
    undo_all()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _end(number: int) -> NoReturn:
    with suppress(OSError):
        os.write(2, f"error: {message(number)}\n".encode())
    exit_now(exit_code(number))


def _watch(reading: int, numbers: set[int], unwinding: threading.Event, over: threading.Event) -> None:
    """Wait for a signal, and end the process if the main thread does not."""
    while number := os.read(reading, 1):
        if number[0] in numbers and not over.wait(_NOTICED):
            if unwinding.is_set() and over.wait(_UNWOUND):
                return
            _end(number[0])


def _leave_terminal() -> None:
    """Write nothing more to a terminal that is gone: it would raise an OSError while the stack unwinds."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), descriptor)


def _forget() -> None:
    """Unset the wakeup descriptor in a child process, which the parent's signals do not concern."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
