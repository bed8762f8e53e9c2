"""Jobs that wait for the engine, the request that each belongs to, and the observer of a server."""

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
    """Receives measurements from a server."""

    def stage(self, name: str, seconds: float) -> None:
        """Called when a stage of a request has ended."""

    def batch(self, images: int) -> None:
        """Called when the engine is called with a batch of images."""

    def cache(self, hit: bool) -> None:
        """Called when an image was looked up in the cache."""

    def engine_failed(self) -> None:
        """Called when a call of the engine raised an error."""


@dataclass(frozen=True)
class Ticket:
    """A request that has been let in.

    Attributes:
        request_id: identifies it in the log.
        deadline: the monotonic time in seconds after which nothing more is done for it.
        hold: called with the number of bytes that it is about to hold; raises Overloaded if there is no room.
    """

    request_id: str
    deadline: float
    hold: Callable[[int], None] = lambda count: None

    @property
    def seconds_left(self) -> float:
        """The seconds until the deadline; 0 after it."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Check the deadline; this is called before each stage of the request.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        if time.monotonic() > self.deadline:
            raise DeadlineExceeded("the request waited past its deadline", "try again, or ask for less")


@dataclass(eq=False)
class Job(Generic[T]):
    """Work that waits for the engine. Its future can be cancelled until it has a result."""

    ticket: Ticket
    future: Future[T] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    def wanted(self) -> bool:
        """Whether to run or continue the job: it is neither cancelled nor past its deadline."""
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
    """An image whose features are wanted from a bundle under a condition; `key` is its key in the cache."""

    bundle: str = ""
    prompt: str | None = None
    key: bytes = b""
    image: FittedImage | None = None


@dataclass(eq=False)
class SlicedJob(Job[list[Any]]):
    """Other work that uses a model, which is run slice by slice.

    Attributes:
        stage: the name of the stage, for measurements.
        slices: each step does a part of the work and yields its result.
        results: the results so far.
        seconds: the time that the steps took so far.
    """

    stage: str = ""
    slices: Iterator[Any] = field(default_factory=lambda: iter(()))
    results: list[Any] = field(default_factory=list)
    seconds: float = 0.0
