"""What waits for the engine, for which request and until when; and who is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ditf.runtime.features import FeatureMap
from ditf.runtime.images import FittedImage
from ditf.runtime.serving.errors import DeadlineExceeded

T = TypeVar("T")


class Observer(Protocol):
    """Who wants to know what a server does."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a request took so long."""

    def batch(self, images: int) -> None:
        """The engine is called with so many images."""

    def cache(self, hit: bool) -> None:
        """An image was looked for in the cache."""

    def engine_failed(self) -> None:
        """A call of the engine raised."""


@dataclass(frozen=True)
class Ticket:
    """A request on its way.

    Attributes:
        request_id: for the log.
        deadline: when nothing more is done for it (monotonic, s).
        hold: counts bytes that it is about to hold; raises Overloaded where there is no room.
    """

    request_id: str
    deadline: float
    hold: Callable[[int], None] = lambda count: None

    @property
    def seconds_left(self) -> float:
        """Until the deadline; 0 after it."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Called before a stage of the request.

        Raises:
            DeadlineExceeded: it is too late for it.
        """
        if time.monotonic() > self.deadline:
            raise DeadlineExceeded("the request waited past its deadline", "try again, or ask for less")


@dataclass(eq=False)
class Job(Generic[T]):
    """What waits for the engine. Its future can be cancelled until the result is there."""

    ticket: Ticket
    future: Future[T] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    def wanted(self) -> bool:
        """Whether to run it, or go on with it: nobody gave it up, and it is not too late."""
        if self.future.cancelled():
            return False
        try:
            self.ticket.check()
        except DeadlineExceeded as error:
            self.fail(error)
            return False
        return True

    def succeed(self, result: T) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(eq=False)
class ImageJob(Job[FeatureMap]):
    """An image whose features are wanted: of which bundle and condition, and its key in the cache."""

    bundle: str = ""
    prompt: str | None = None
    key: bytes = b""
    image: FittedImage | None = None


@dataclass(eq=False)
class SlicedJob(Job[list[Any]]):
    """Something else that uses a model, run slice by slice.

    Attributes:
        slices: each step does a part of the work and gives its result.
        results: of the steps so far.
        seconds: they took.
    """

    stage: str = ""
    slices: Iterator[Any] = field(default_factory=lambda: iter(()))
    results: list[Any] = field(default_factory=list)
    seconds: float = 0.0
