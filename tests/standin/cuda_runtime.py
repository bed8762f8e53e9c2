"""The functions of `cuda.bindings.runtime` that ditf calls, and some more, on the stand-in.

Enumerations are those of the real module, so names and numbers are real.
"""

from __future__ import annotations

import importlib
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

from tests.standin.memory import Illegal, host_view
from tests.standin.streams import Capture, Event, Handle, Stream, capturing, run
from tests.standin.world import CudaFault, World

_HOST_TO_HOST, _HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE, _DEFAULT = range(5)
_ALLOWED_AFTER_STICKY = ("cudaGetLastError", "cudaPeekAtLastError", "cudaGetDevice", "cudaSetDevice",
                         "cudaGetDeviceCount", "cudaGetErrorName", "cudaGetErrorString")  # fmt: skip
_UNSAFE_IN_CAPTURE = (
    "cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost", "cudaFreeHost", "cudaHostRegister",
    "cudaHostUnregister",
    "cudaMemcpy", "cudaMemset", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaEventQuery",
)  # fmt: skip


class Api:
    """The functions; each returns what its namesake returns, without the error code, or raises CudaFault."""

    def __init__(self, world: World, real: types.ModuleType) -> None:
        self.world = world
        self.real = real

    # devices
    def cudaGetDeviceCount(self) -> int:
        return len(self.world.models)

    def cudaGetDevice(self) -> int:
        return self.world.device

    def cudaSetDevice(self, device: int) -> None:
        if not 0 <= device < len(self.world.models):
            raise CudaFault("cudaErrorInvalidDevice")
        self.world.device = device

    def cudaDriverGetVersion(self) -> int:
        return self.world.driver

    def cudaRuntimeGetVersion(self) -> int:
        return self.world.driver

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> int:
        if not 0 <= device < len(self.world.models):
            raise CudaFault("cudaErrorInvalidDevice")
        model = self.world.models[device]
        values = {
            "cudaDevAttrMultiProcessorCount": model.multiprocessors,
            "cudaDevAttrComputeCapabilityMajor": model.capability[0],
            "cudaDevAttrComputeCapabilityMinor": model.capability[1],
            "cudaDevAttrIntegrated": int(model.integrated),
        }
        return values[attr.name]

    def cudaMemGetInfo(self) -> tuple[int, int]:
        device, memory = self.world.device, self.world.memory
        return memory.totals[device] - memory.used[device], memory.totals[device]

    def cudaDeviceSynchronize(self) -> None:
        for stream in list(self.world.streams.values()):
            if stream.device == self.world.device:
                stream.drain()

    # memory
    def cudaMalloc(self, size: int) -> int:
        if size == 0:
            return 0
        address = self.world.memory.allocate(size, self.world.device)
        if not address:
            raise CudaFault("cudaErrorMemoryAllocation")
        return address

    def cudaFree(self, devPtr: Any) -> None:
        if int(devPtr) == 0:
            return
        for stream in list(self.world.streams.values()):  # cudaFree waits for the device
            stream.drain()
        try:
            self.world.memory.free(int(devPtr))
        except Illegal as error:
            self.world.fault(str(error))
            raise CudaFault("cudaErrorInvalidValue") from error

    def cudaHostAlloc(self, size: int, flags: int) -> int:
        return self.world.host.allocate(size)

    def cudaMallocHost(self, size: int) -> int:
        return self.world.host.allocate(size)

    def cudaFreeHost(self, ptr: Any) -> None:
        try:
            self.world.host.free(int(ptr))
        except Illegal as error:
            self.world.fault(str(error))
            raise CudaFault("cudaErrorInvalidValue") from error

    def cudaHostRegister(self, ptr: Any, size: int, flags: int) -> None:
        if not int(ptr) or not size:
            raise CudaFault("cudaErrorInvalidValue")
        if self.world.host.holds(int(ptr), 1):
            raise CudaFault("cudaErrorHostMemoryAlreadyRegistered")
        self.world.host.register(int(ptr), size)

    def cudaHostUnregister(self, ptr: Any) -> None:
        try:
            self.world.host.unregister(int(ptr))
        except Illegal as error:
            self.world.fault(str(error))
            raise CudaFault("cudaErrorHostMemoryNotRegistered") from error

    def cudaMemcpy(self, dst: Any, src: Any, count: int, kind: Any) -> None:
        for stream in list(self.world.streams.values()):
            if stream.blocking:  # the legacy default stream does not wait for the others
                stream.drain()
        run(self.world, self._copy(int(dst), int(src), count, int(kind)))

    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: Any, stream: Any) -> None:
        queue = self._stream(stream)
        for address in (int(dst), int(src)):
            if not self.world.memory.owns(address) and not self.world.host.holds(address, count):
                self.world.fault(
                    f"asynchronous copy of {count} bytes with host memory that is not page-locked"
                )
                raise CudaFault("cudaErrorInvalidValue")
        queue.put(self._copy(int(dst), int(src), count, int(kind), pinned=True))

    def cudaMemset(self, devPtr: Any, value: int, count: int) -> None:
        def work() -> None:
            self.world.memory.view(int(devPtr), count)[...] = value

        run(self.world, work)

    def cudaMemsetAsync(self, devPtr: Any, value: int, count: int, stream: Any) -> None:
        def work() -> None:
            self.world.memory.view(int(devPtr), count)[...] = value

        self._stream(stream).put(work)

    def _copy(
        self, target: int, source: int, count: int, kind: int, pinned: bool = False
    ) -> Callable[[], None]:
        memory = self.world.memory
        to_device, from_device = memory.owns(target), memory.owns(source)
        kinds = {(False, False): _HOST_TO_HOST, (True, False): _HOST_TO_DEVICE,
                  (False, True): _DEVICE_TO_HOST, (True, True): _DEVICE_TO_DEVICE}  # fmt: skip
        actual = kinds[to_device, from_device]
        if kind not in (_DEFAULT, actual):
            self.world.fault(f"a copy of kind {kind} has addresses of kind {actual}")
            raise CudaFault("cudaErrorInvalidValue")

        def work() -> None:
            if not count:
                return
            read = memory.view(source, count) if from_device else self._host(source, count, pinned)
            write = memory.view(target, count) if to_device else self._host(target, count, pinned)
            write[...] = read

        return work

    def _host(self, address: int, count: int, pinned: bool) -> Any:
        if not address:
            raise Illegal("copy with a null pointer")
        if pinned and not self.world.host.holds(address, count):
            raise Illegal(f"a copy of page-locked memory at {address:#x} that was freed before it ran")
        return host_view(address, count)

    # streams and events
    def cudaStreamCreate(self) -> Handle:
        return self._new_stream(blocking=True)

    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        return self._new_stream(blocking=not flags & 1)

    def _new_stream(self, blocking: bool) -> Handle:
        handle = self.world.handle()
        self.world.streams[handle] = Stream(self.world, handle, self.world.device, blocking)
        return Handle(handle)

    def cudaStreamDestroy(self, stream: Any) -> None:
        found = self._stream(stream)
        if found.queue:
            self.world.fault("a stream was destroyed before its work was done")
        del self.world.streams[found.handle]

    def cudaStreamSynchronize(self, stream: Any) -> None:
        found = self._stream(stream)
        if found.capture is not None:
            found.capture.invalid = True
            raise CudaFault("cudaErrorStreamCaptureUnsupported")
        found.drain()

    def cudaStreamQuery(self, stream: Any) -> None:
        if self._stream(stream).queue:
            raise CudaFault("cudaErrorNotReady")

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        found = self._event(event)

        def work() -> None:
            if found.stream is not None and found.seconds is None:
                found.stream.drain()

        self._stream(stream).put(work)

    def cudaEventCreate(self) -> Handle:
        handle = self.world.handle()
        self.world.events[handle] = Event(handle, self.world.device)
        return Handle(handle)

    def cudaEventCreateWithFlags(self, flags: int) -> Handle:
        return self.cudaEventCreate()

    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        self._event(event).record(self._stream(stream))

    def cudaEventSynchronize(self, event: Any) -> None:
        found = self._event(event)
        if found.stream is not None and found.seconds is None:
            found.stream.drain()

    def cudaEventQuery(self, event: Any) -> None:
        found = self._event(event)
        if found.stream is not None and found.seconds is None:
            raise CudaFault("cudaErrorNotReady")

    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:
        first, second = self._event(start), self._event(end)
        if first.stream is None or second.stream is None:
            raise CudaFault("cudaErrorInvalidResourceHandle")
        if first.seconds is None or second.seconds is None:
            raise CudaFault("cudaErrorNotReady")
        return (second.seconds - first.seconds) * 1e3

    def cudaEventDestroy(self, event: Any) -> None:
        del self.world.events[self._event(event, any_device=True).handle]

    # graphs
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        found = self._stream(stream)
        if found.capture is not None:
            raise CudaFault("cudaErrorIllegalState")
        found.capture = Capture(int(mode), threading.get_ident())

    def cudaStreamIsCapturing(self, stream: Any) -> Any:
        capture = self._stream(stream).capture
        status = self.real.cudaStreamCaptureStatus
        if capture is None:
            return status.cudaStreamCaptureStatusNone
        if capture.invalid:
            return status.cudaStreamCaptureStatusInvalidated
        return status.cudaStreamCaptureStatusActive

    def cudaStreamEndCapture(self, stream: Any) -> Handle:
        found = self._stream(stream)
        capture, found.capture = found.capture, None
        if capture is None:
            raise CudaFault("cudaErrorIllegalState")
        if capture.mode != 2 and capture.thread != threading.get_ident():
            raise CudaFault("cudaErrorStreamCaptureWrongThread")
        if capture.invalid:
            raise CudaFault("cudaErrorStreamCaptureInvalidated")
        handle = self.world.handle()
        self.world.graphs[handle] = capture.work
        return Handle(handle)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Handle:
        work = self._known(self.world.graphs, graph, "graph")
        handle = self.world.handle()
        self.world.executables[handle] = list(work)
        return Handle(handle)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:
        work = self._known(self.world.executables, graphExec, "executable graph")
        queue = self._stream(stream)
        for one in work:
            queue.put(one)

    def cudaGraphDestroy(self, graph: Any) -> None:
        self._known(self.world.graphs, graph, "graph")
        del self.world.graphs[int(graph)]

    def cudaGraphExecDestroy(self, graphExec: Any) -> None:
        self._known(self.world.executables, graphExec, "executable graph")
        del self.world.executables[int(graphExec)]

    # errors
    def cudaGetLastError(self) -> None:
        error = self.world.last_error(reset=True)
        if error != "cudaSuccess":
            raise CudaFault(error)

    def cudaPeekAtLastError(self) -> None:
        error = self.world.last_error(reset=False)
        if error != "cudaSuccess":
            raise CudaFault(error)

    def _stream(self, stream: Any) -> Stream:
        found: Stream = self._known(self.world.streams, stream, "stream")
        if found.device != self.world.device:
            self.world.fault(
                f"a stream of device {found.device} is used while {self.world.device} is current"
            )
            raise CudaFault("cudaErrorInvalidResourceHandle")
        return found

    def _event(self, event: Any, any_device: bool = False) -> Event:
        found: Event = self._known(self.world.events, event, "event")
        if found.device != self.world.device and not any_device:
            self.world.fault(
                f"an event of device {found.device} is used while {self.world.device} is current"
            )
            raise CudaFault("cudaErrorInvalidResourceHandle")
        return found

    def _known(self, objects: dict[int, Any], handle: Any, kind: str) -> Any:
        if int(handle) not in objects:
            self.world.fault(f"use of a {kind} that does not exist or was destroyed")
            raise CudaFault("cudaErrorInvalidResourceHandle")
        return objects[int(handle)]


FUNCTIONS = tuple(name for name in vars(Api) if name.startswith("cuda"))


def cuda_module(world: World) -> types.ModuleType:
    """A module that takes the place of `cuda.bindings.runtime`."""
    real = importlib.import_module("cuda.bindings.runtime")
    if hasattr(real, "__standin__"):
        real = real.__standin__
    module = types.ModuleType("cuda.bindings.runtime", __doc__)
    for name in dir(real):
        if isinstance(getattr(real, name), type):  # enumerations
            setattr(module, name, getattr(real, name))
    api = Api(world, real)
    for name in FUNCTIONS:
        setattr(module, name, _checked(world, real, name, getattr(api, name)))
    module.__dict__["__standin__"] = real
    return module


def _results(function: Any) -> int:
    """How many results follow the error code; if the call fails, each is None."""
    returned = function.__annotations__["return"]
    return 0 if returned == "None" else returned.count(",") + 1


def _checked(world: World, real: types.ModuleType, name: str, function: Any) -> Any:
    errors = real.cudaError_t

    signature = inspect.signature(function)
    none = (None,) * _results(function)

    def call(*arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        signature.bind(*arguments, **keywords)  # a TypeError, as of the real module
        failure = world.due(name)
        if failure is not None:
            if failure.exception is not None:
                raise failure.exception
            world.remember(str(failure.error))
            return getattr(errors, str(failure.error)), *none
        if world.sticky and name not in _ALLOWED_AFTER_STICKY:
            return getattr(errors, world.sticky), *none
        with world.lock:
            capture = capturing(world) if name in _UNSAFE_IN_CAPTURE else None
            if capture is not None:
                capture.invalid = True
                world.fault(f"{name} during capture")
                world.remember("cudaErrorStreamCaptureUnsupported")
                return errors.cudaErrorStreamCaptureUnsupported, *none
            try:
                result = function(*arguments, **keywords)
            except CudaFault as fault:
                if name != "cudaGetLastError":
                    world.remember(fault.error, fault.sticky)
                return getattr(errors, fault.error), *none
        values = result if isinstance(result, tuple) else () if result is None else (result,)
        return (errors.cudaSuccess, *values)

    call.__name__ = name
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call
