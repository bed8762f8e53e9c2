"""Work on a CUDA stream: its time by the GPU's clock, and capturing it as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from ditf.runtime.backends.cuda import Cuda
from ditf.runtime.errors import DitfError


class Stopwatch:
    """Measures, by the GPU's clock, the time of what is queued on a stream inside a `with` block."""

    def __init__(self, cuda: Cuda, stream: Any) -> None:
        self._cuda = cuda
        self._stream = stream
        self._events: list[Any] = []
        try:
            for _ in range(2):
                self._events.append(cuda("cudaEventCreate"))
        except DitfError:
            self.close()
            raise

    def __enter__(self) -> Stopwatch:
        self._cuda("cudaEventRecord", self._events[0], self._stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._cuda("cudaEventRecord", self._events[1], self._stream)

    @property
    def seconds(self) -> float:
        """The seconds of the last `with` block; wait for the stream before reading this."""
        return float(self._cuda("cudaEventElapsedTime", *self._events)) / 1e3

    def close(self) -> None:
        """Free both events. After an error the other one is still freed."""
        with ExitStack() as stack:
            while self._events:
                stack.callback(self._cuda, "cudaEventDestroy", self._events.pop())


def capture(cuda: Cuda, stream: Any, work: Callable[[], None]) -> Any:
    """Capture what `work` queues on a stream as a CUDA graph that can be launched.

    Raises:
        DitfError: a part of the work cannot be captured. The stream stays usable.
    """
    mode = cuda.constant("cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal")
    try:
        cuda("cudaStreamBeginCapture", stream, mode)
        work()
    except BaseException:
        # The capture must end, or the stream cannot be used again. What it holds, if anything, is incomplete.
        with suppress(DitfError):
            cuda("cudaGraphDestroy", cuda("cudaStreamEndCapture", stream))
        raise
    graph = cuda("cudaStreamEndCapture", stream)
    try:
        return cuda("cudaGraphInstantiate", graph, 0)
    finally:
        cuda("cudaGraphDestroy", graph)
