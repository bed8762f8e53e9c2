"""The state of the stand-in: devices, objects that are alive, faults, and calls that fail on demand."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.standin.memory import DeviceMemory, HostMemory


class CudaFault(Exception):
    """A call or a piece of queued work failed with an error of CUDA's runtime API.

    Args:
        error: the name, such as "cudaErrorInvalidValue".
        sticky: every later call fails with the same error, as after an illegal address.
    """

    def __init__(self, error: str, sticky: bool = False) -> None:
        super().__init__(error)
        self.error = error
        self.sticky = sticky


@dataclass
class DeviceModel:
    """What a stand-in device says of itself.

    Attributes:
        name: as the driver gives it.
        capability: such as (8, 9).
        multiprocessors: number of them.
        total_bytes: its memory.
        integrated: it shares the host's memory, as a Jetson does.
    """

    name: str = "NVIDIA Stand-in"
    capability: tuple[int, int] = (8, 9)
    multiprocessors: int = 24
    total_bytes: int = 8 << 30
    integrated: bool = False


@dataclass
class Failure:
    """A call that fails on demand: `after` calls pass, then `times` fail."""

    name: str
    error: str | None
    exception: BaseException | None
    after: int
    times: int


@dataclass
class World:
    """One process's stand-in.

    Attributes:
        models: the devices, in their order.
        driver: the newest CUDA version of the driver; 13000 is 13.0.
        faults: what a driver would leave undefined or report; tests assert that it is empty.
        loggers: the different logger objects that were given to TensorRT.
        calls: how often each function was called.
        compilations: kernels compiled since the start, by what they were compiled for.
        own_graphs: how often TensorRT-RTX "captured" or "replayed" a graph of its own.
    """

    models: list[DeviceModel] = field(default_factory=lambda: [DeviceModel()])
    driver: int = 13000

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.memory = DeviceMemory([model.total_bytes for model in self.models])
        self.host = HostMemory()
        self.faults: list[str] = []
        self.loggers: list[Any] = []
        self.calls: Counter[str] = Counter()
        self.compilations: Counter[str] = Counter()
        self.own_graphs: Counter[str] = Counter()
        self.streams: dict[int, Any] = {}
        self.events: dict[int, Any] = {}
        self.graphs: dict[int, Any] = {}
        self.executables: dict[int, Any] = {}
        self.engines: dict[int, str] = {}
        self.scratch_in_flight: list[tuple[int, int, int]] = []  # (stream, address, bytes)
        self.sticky = ""
        self._last = "cudaSuccess"
        self._failures: list[Failure] = []
        self._threads = threading.local()
        self._next = 0x1000

    @property
    def device(self) -> int:
        """The current device of the calling thread."""
        return int(getattr(self._threads, "device", 0))

    @device.setter
    def device(self, index: int) -> None:
        self._threads.device = index

    def handle(self) -> int:
        """A number that no object has yet."""
        with self.lock:
            self._next += 0x10
            return self._next

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)

    def fail(
        self,
        name: str,
        error: str | None = "cudaErrorUnknown",
        after: int = 0,
        times: int = 1,
        exception: BaseException | None = None,
    ) -> None:
        """Let calls of a function fail.

        Args:
            name: of a function of CUDA's runtime API, or "execute_async_v3", "create_execution_context", ...
            error: what CUDA returns; a TensorRT call, which has no error code, returns None or False.
            after: number of calls that pass first.
            times: number of calls that fail.
            exception: what is raised instead.
        """
        self._failures.append(Failure(name, error if exception is None else None, exception, after, times))

    def due(self, name: str) -> Failure | None:
        """The failure that this call of a function meets, if one was asked for."""
        with self.lock:
            self.calls[name] += 1
            for failure in self._failures:
                if failure.name != name:
                    continue
                if failure.after:
                    failure.after -= 1
                elif failure.times:
                    failure.times -= 1
                    return failure
        return None

    def refused(self, name: str) -> bool:
        """Whether a TensorRT call fails on demand; raises if an exception was asked for."""
        failure = self.due(name)
        if failure is not None and failure.exception is not None:
            raise failure.exception
        return failure is not None

    def remember(self, error: str, sticky: bool = False) -> None:
        """Keep an error for cudaGetLastError; a sticky one for every later call."""
        self._last = error
        if sticky:
            self.sticky = error

    def last_error(self, reset: bool) -> str:
        error = self.sticky or self._last
        if reset:
            self._last = "cudaSuccess"
        return error

    def alive(self) -> list[str]:
        """Everything that was made and not freed."""
        kinds = {
            "stream": self.streams,
            "event": self.events,
            "graph": self.graphs,
            "executable graph": self.executables,
        }
        found = [f"{kind} {handle:#x}" for kind, objects in kinds.items() for handle in objects]
        found += self.memory.alive() + self.host.alive() + sorted(self.engines.values())
        return found
