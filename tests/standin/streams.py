"""Streams that run nothing until they are waited for, events, and captured graphs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.standin.memory import Illegal
from tests.standin.world import CudaFault, World

Work = Callable[[], None]


class Handle:
    """What cuda-python returns for a stream, an event or a graph; int() turns it into an address."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __int__(self) -> int:
        return self.number

    def __index__(self) -> int:
        return self.number

    def getPtr(self) -> int:  # as cuda-python spells it
        return self.number


@dataclass
class Capture:
    """A capture in progress.

    Attributes:
        mode: 0 global, 1 thread-local, 2 relaxed.
        thread: which began it.
        work: what was queued since.
        invalid: a call that is not allowed during capture was made.
    """

    mode: int
    thread: int
    work: list[Work] = field(default_factory=list)
    invalid: bool = False


class Stream:
    """A queue of work on a device."""

    def __init__(self, world: World, handle: int, device: int, blocking: bool) -> None:
        self.world = world
        self.handle = handle
        self.device = device
        self.blocking = blocking
        self.queue: deque[Work] = deque()
        self.capture: Capture | None = None

    def put(self, work: Work) -> None:
        """Queue work, or add it to the graph that is being captured."""
        with self.world.lock:
            if self.capture is None:
                self.queue.append(work)
            elif not self.capture.invalid:
                self.capture.work.append(work)

    def drain(self) -> None:
        """Run what is queued. A failure becomes a sticky error.

        Raises:
            CudaFault: of the work that failed.
        """
        with self.world.lock:
            while self.queue:
                run(self.world, self.queue.popleft())


def run(world: World, work: Work) -> None:
    """Run one piece of work as the device would.

    Raises:
        CudaFault: it failed; the error is sticky.
    """
    try:
        work()
    except Illegal as error:
        world.fault(str(error))
        world.remember("cudaErrorIllegalAddress", sticky=True)
        raise CudaFault("cudaErrorIllegalAddress", sticky=True) from error


@dataclass
class Event:
    """A point of a stream's work; `seconds` is set when the work reaches it."""

    handle: int
    device: int
    stream: Stream | None = None
    seconds: float | None = None

    def record(self, stream: Stream) -> None:
        self.stream, self.seconds = stream, None

        def reached() -> None:
            self.seconds = time.perf_counter()

        stream.put(reached)


def capturing(world: World) -> Capture | None:
    """The capture that forbids a call of this thread that allocates or synchronises; None if none does."""
    for stream in world.streams.values():
        capture = stream.capture
        if capture is None or capture.mode == 2:
            continue
        if capture.mode == 0 or capture.thread == threading.get_ident():
            return capture
    return None
