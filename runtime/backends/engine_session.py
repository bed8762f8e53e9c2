"""Running a plan of TensorRT or TensorRT-RTX, with buffers that stay and a CUDA graph for each shape."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Union

import numpy as np

from ditf.runtime.backends.cuda import (
    DeviceArray,
    Pinned,
    Stopwatch,
    capture,
    open_cuda,
)
from ditf.runtime.backends.engine_contexts import ContextFactory
from ditf.runtime.backends.flavour import Log, has
from ditf.runtime.backends.plan_loading import load_plan
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError, DitfError, InputError

logger = logging.getLogger(__name__)

Array = Union[np.ndarray, DeviceArray]
Shapes = dict[str, tuple[int, ...]]

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "INT8": "int8", "BOOL": "bool",
}  # fmt: skip
_SHAPES_KEPT = 4  # contexts and graphs are kept for the shapes used last
_ALIGNMENT = 256  # of scratch memory, bytes


class EngineSession:
    """A deserialised plan; see `ditf.runtime.backends.Session`.

    Each combination of input shapes has an execution context of its own, because a captured graph is tied
    to its context. All contexts share one scratch memory, so a lock lets only one run at a time.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        path: the plan's file, for messages.
        plan: the plan's verified bytes, of an engine that fits this machine.
        detail: what runs it, for people.
        graph: the graph that a plan without weights is refitted from; None for a plan that has its weights.
        kernels: the file in which TensorRT-RTX keeps the kernels that it compiles on this machine.
        host_code: allow the plan to run code of its own on the CPU, as a version-compatible plan does.

    Attributes:
        device_seconds: the duration of the last run by the GPU's clock, copies included.
        device_bytes: the GPU memory for scratch and buffers, without the plan's weights.

    Raises:
        BundleError: TensorRT refuses the plan.
        OutOfDeviceMemory: the engine does not fit into the GPU's memory.
    """

    def __init__(
        self,
        trt: Any,
        path: Path,
        plan: bytes,
        detail: str,
        graph: Graph | None = None,
        kernels: Path | None = None,
        host_code: bool = False,
    ) -> None:
        self._trt = trt
        self._cuda = open_cuda()
        self._lock = threading.Lock()
        self._log = Log(trt)
        self._plan = path
        self.detail = detail
        self.device_seconds = 0.0
        self._closed = False
        self._scratch = (0, 0)  # address, bytes
        self._bindings: OrderedDict[tuple[Any, ...], _Binding] = OrderedDict()
        self._buffers: dict[str, tuple[int, int]] = {}  # address, bytes
        self._stream = self._cuda("cudaStreamCreateWithFlags", 1)  # cudaStreamNonBlocking
        self._handle = int(self._stream)  # as TensorRT takes it
        self._watch = Stopwatch(self._cuda, self._stream)
        self._runtime = trt.Runtime(self._log.logger)
        self._runtime.engine_host_code_allowed = host_code
        self._engine = load_plan(trt, self._runtime, self._log, path, plan, graph, self._cuda.free_bytes)
        self._contexts: ContextFactory | None = ContextFactory(trt, self._engine, kernels)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._dtypes = {name: _dtype(self._engine.get_tensor_dtype(name).name) for name in names}
        shapes = {
            name: tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
            for name in names
        }
        self.inputs = {name: shapes[name] for name in names if modes[name] == trt.TensorIOMode.INPUT}
        self.outputs = {name: shapes[name] for name in names if modes[name] == trt.TensorIOMode.OUTPUT}
        self._pinned = {name: Pinned(self._cuda) for name in names}
        self.profiles = tuple(self._profile(i) for i in range(self._engine.num_optimization_profiles))

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """The (smallest, largest) batch of each profile, by its image input or else its first input."""
        first = "image" if "image" in self.inputs else next(iter(self.inputs))
        return tuple((profile[first][0][0], profile[first][1][0]) for profile in self.profiles)

    @property
    def device_bytes(self) -> int:
        return self._scratch[1] + sum(nbytes for _, nbytes in self._buffers.values())

    def run(self, feeds: Mapping[str, Array], keep: Collection[str] = ()) -> dict[str, Any]:
        """Run the plan.

        Args:
            feeds: arrays in host memory, or `DeviceArray`s that an earlier run kept.
            keep: names of outputs to leave in GPU memory, as `DeviceArray`s.

        Raises:
            InputError: the plan does not take these shapes or types.
            DitfError: the GPU failed, or has too little memory. The session can be used again.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed")
            self._check(feeds)
            binding = self._binding({name: tuple(feeds[name].shape) for name in self.inputs})
            with self._watch:
                for name in self.inputs:
                    self._put(name, feeds[name])
                self._execute(binding)
                outputs = {
                    name: self._fetch(name, binding.outputs[name], name in keep) for name in self.outputs
                }
            self._cuda("cudaStreamSynchronize", self._stream)
            self.device_seconds = self._watch.seconds
            return {
                name: value if isinstance(value, DeviceArray) else value.copy()
                for name, value in outputs.items()
            }

    def close(self) -> None:
        """Free all that the session holds. Arrays that were kept stay valid."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._forget()
            assert self._contexts is not None
            self._contexts.save_kernels()
            for pinned in self._pinned.values():
                pinned.close()
            for address, _ in (*self._buffers.values(), self._scratch):
                if address:
                    self._cuda.free(address)
            self._buffers.clear()
            self._cuda.trim()
            self._watch.close()
            self._cuda("cudaStreamDestroy", self._stream)
            self._engine = self._contexts = self._runtime = None  # TensorRT requires this order

    def _profile(self, index: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """{input: (smallest shape, largest shape)} of a profile."""
        shapes = {}
        for name in self.inputs:
            smallest, _, largest = self._engine.get_tensor_profile_shape(name, index)
            shapes[name] = (tuple(smallest), tuple(largest))
        return shapes

    def _check(self, feeds: Mapping[str, Array]) -> None:
        for name in self.inputs:
            if name not in feeds:
                raise InputError(f"the plan takes {name}, which was not given")
            if feeds[name].dtype != self._dtypes[name]:
                raise InputError(f"{name} must be {self._dtypes[name]}, got {feeds[name].dtype}")

    def _binding(self, shapes: Shapes) -> _Binding:
        """The context for these input shapes, with every address set."""
        key = tuple(shapes.values())
        known = self._bindings.get(key)
        if known is not None:
            self._bindings.move_to_end(key)
            return known
        index = next((i for i, profile in enumerate(self.profiles) if _within(shapes, profile)), None)
        if index is None:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise InputError(f"{self._plan} was not built for {given}", "build it with another --batch")
        assert self._contexts is not None  # not closed
        context = self._contexts.context()
        if context is None:
            raise BundleError(
                f"{self._plan} gives no execution context ({self._log.last})",
                "build it again on this machine",
            )
        if len(self.profiles) > 1:
            context.set_optimization_profile_async(index, self._handle)
            self._cuda("cudaStreamSynchronize", self._stream)
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        outputs = {name: tuple(int(n) for n in context.get_tensor_shape(name)) for name in self.outputs}
        grown = [self._reserve(name, shape) for name, shape in {**shapes, **outputs}.items()]
        if any([*grown, self._reserve_scratch(context.update_device_memory_size_for_shapes())]):
            self._forget()  # existing graphs and contexts hold the old addresses
        for name in (*self.inputs, *self.outputs):
            context.set_tensor_address(name, self._buffers[name][0])
        if has(self._trt, "IExecutionContext.set_device_memory"):
            context.set_device_memory(*self._scratch)
        else:  # before 10.4
            context.device_memory = self._scratch[0]
        binding = self._bindings[key] = _Binding(context, outputs)
        while len(self._bindings) > _SHAPES_KEPT:
            _, oldest = self._bindings.popitem(last=False)
            self._release(oldest)
        return binding

    def _execute(self, binding: _Binding) -> None:
        """Run a context: the first time directly, from the second time on as a captured CUDA graph."""

        def enqueue() -> None:
            if not binding.context.execute_async_v3(self._handle):
                raise DitfError(
                    f"{self._trt.__name__} cannot run {self._plan} ({self._log.last})", "ditf check -v"
                )

        binding.runs += 1
        if binding.runs == 1 or not binding.capturable:
            enqueue()
            return
        if binding.graph is None:
            if has(self._trt, "IExecutionContext.is_stream_capturable"):
                binding.capturable = bool(binding.context.is_stream_capturable(self._handle))
            if binding.capturable:
                try:
                    binding.graph = capture(self._cuda, self._stream, enqueue)
                except DitfError as error:
                    binding.capturable = False
                    logger.warning("%s runs without a CUDA graph: %s", self._plan, error.problem)
            if not binding.capturable:
                enqueue()
                return
        self._cuda("cudaGraphLaunch", binding.graph, self._stream)

    def _put(self, name: str, value: Array) -> None:
        address = self._buffers[name][0]
        if isinstance(value, DeviceArray):
            self._cuda.copy(address, value.address, value.nbytes, self._stream)
            return
        pinned = self._pinned[name]
        pinned.array(value.shape, value.dtype)[...] = value
        self._cuda.copy(address, pinned.address, value.nbytes, self._stream)

    def _fetch(self, name: str, shape: tuple[int, ...], keep: bool) -> Array:
        dtype = self._dtypes[name]
        if keep:
            kept = self._cuda.take(shape, dtype)
            self._cuda.copy(kept.address, self._buffers[name][0], kept.nbytes, self._stream)
            return kept
        array = self._pinned[name].array(shape, dtype)
        self._cuda.copy(self._pinned[name].address, self._buffers[name][0], array.nbytes, self._stream)
        return array

    def _reserve(self, name: str, shape: tuple[int, ...]) -> bool:
        """Make a tensor's buffer large enough. Returns whether an existing buffer moved."""
        nbytes = max(1, int(np.prod(shape)) * self._dtypes[name].itemsize)
        address, had = self._buffers.get(name, (0, 0))
        if nbytes <= had:
            return False
        new = self._cuda.allocate(nbytes)
        if address:
            self._cuda.free(address)
        self._buffers[name] = (new, nbytes)
        return bool(address)

    def _reserve_scratch(self, nbytes: int) -> bool:
        nbytes = -(-max(1, nbytes) // _ALIGNMENT) * _ALIGNMENT
        address, had = self._scratch
        if nbytes <= had:
            return False
        new = self._cuda.allocate(nbytes)
        if address:
            self._cuda.free(address)
        self._scratch = (new, nbytes)
        return bool(address)

    def _forget(self) -> None:
        while self._bindings:
            self._release(self._bindings.popitem()[1])

    def _release(self, binding: _Binding) -> None:
        if binding.graph is not None:
            self._cuda("cudaGraphExecDestroy", binding.graph)
        binding.context = binding.graph = None


class _Binding:
    """An execution context with its shapes and addresses set, and its CUDA graph once it is captured."""

    def __init__(self, context: Any, outputs: Shapes) -> None:
        self.context = context
        self.outputs = outputs
        self.graph: Any = None
        self.capturable = True
        self.runs = 0


def _within(shapes: Shapes, profile: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    return all(
        len(shape) == len(profile[name][0])
        and all(a <= n <= b for a, n, b in zip(profile[name][0], shape, profile[name][1], strict=True))
        for name, shape in shapes.items()
    )


def _dtype(name: str) -> np.dtype[Any]:
    if name not in _DTYPES:
        raise BundleError(
            f"the plan has a tensor of type {name}", "export the bundle again with fp16 or fp32"
        )
    return np.dtype(_DTYPES[name])
