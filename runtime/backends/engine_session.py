"""Running a plan of TensorRT or TensorRT-RTX, with buffers that stay and a CUDA graph for each shape."""

from __future__ import annotations

import logging
import threading
import traceback
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ditf.runtime.backends.cuda import Cuda, DeviceArray, OutOfDeviceMemory, open_cuda
from ditf.runtime.backends.cuda_streams import Stopwatch
from ditf.runtime.backends.engine_bindings import Binding, Bindings
from ditf.runtime.backends.engine_buffers import Array, EngineBuffers, Shapes
from ditf.runtime.backends.engine_contexts import ContextFactory
from ditf.runtime.backends.plan_loading import LoadedPlan
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import DitfError, InputError
from ditf.runtime.files.hashed import Content

logger = logging.getLogger(__name__)


class EngineSession:
    """A deserialised plan; see `ditf.runtime.backends.Session`.

    A lock lets only one run at a time. A session that is dropped without `close` frees what it holds.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        path: the plan's file, for messages.
        plan: the plan's verified bytes, of an engine that fits this machine. They are not needed afterwards.
        detail: what runs it, for people.
        graph: the graph that a plan without weights is refitted from; None for a plan that has its weights.
        kernels: the file in which TensorRT-RTX keeps the kernels that it compiles on this machine.
        host_code: allow the plan to run code of its own on the CPU, as a version-compatible plan does.
        device: the number of the GPU. It becomes the current device of each thread that uses the session.

    Attributes:
        inputs, outputs: {name: shape}; a dynamic dimension is None.
        device_seconds: the duration of the last run by the GPU's clock, copies included.
        device_bytes: the GPU memory for scratch and buffers, without the plan's weights.

    Raises:
        BundleError: TensorRT refuses the plan.
        OutOfDeviceMemory: the engine does not fit into the GPU's memory.
        InputError: there is no such device.
    """

    def __init__(
        self,
        trt: Any,
        path: Path,
        plan: Content,
        detail: str,
        graph: Graph | None = None,
        kernels: Path | None = None,
        host_code: bool = False,
        device: int = 0,
    ) -> None:
        self.detail = detail
        self.device_seconds = 0.0
        self._lock = threading.Lock()
        self._parts = _Parts(path, open_cuda(device))
        # Freed when the session is closed or dropped, and at the latest when the process ends.
        self._free = weakref.finalize(self, self._parts.free)
        try:
            self._parts.open(trt, plan, graph, kernels, host_code)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # their variables hold parts of TensorRT
            self._free()
            raise
        self._plan = path
        self.inputs = self._parts.plan.inputs
        self.outputs = self._parts.plan.outputs
        self.profiles = self._parts.plan.profiles

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """The (smallest, largest) batch of each profile, by its image input or else its first input."""
        first = "image" if "image" in self.inputs else next(iter(self.inputs))
        return tuple((profile[first][0][0], profile[first][1][0]) for profile in self.profiles)

    @property
    def device_bytes(self) -> int:
        return self._parts.buffers.nbytes

    def run(self, feeds: Mapping[str, Array], keep: Collection[str] = ()) -> dict[str, Any]:
        """Run the plan.

        Args:
            feeds: arrays in host memory, or `DeviceArray`s that an earlier run kept.
            keep: names of outputs to leave in GPU memory, as `DeviceArray`s.

        Raises:
            InputError: the plan does not take these shapes or types.
            GpuFailed: the GPU failed, and this process cannot use it any more.
            DitfError: the GPU has too little memory, or TensorRT refuses the run. The session can be used
                again.
        """
        with self._lock:
            if not self._free.alive:
                raise RuntimeError("the session is closed")
            self._check(feeds)
            parts = self._parts
            parts.cuda.use()
            binding = None
            try:
                binding, kept = self._ready({name: tuple(feeds[name].shape) for name in self.inputs}, keep)
                with parts.watch:
                    for name in self.inputs:
                        parts.buffers.put(name, feeds[name], parts.stream)
                    parts.bindings.run(binding)
                    fetched = self._fetch(binding, kept)
                parts.cuda("cudaStreamSynchronize", parts.stream)
            except BaseException as error:
                self._clean_up(binding)
                if isinstance(error, DitfError) and parts.cuda.failed:
                    raise parts.cuda.gpu_failed() from error
                raise
            self.device_seconds = parts.watch.seconds
            parts.bindings.ran(binding)
            return {name: kept[name] if name in kept else fetched[name].copy() for name in self.outputs}

    def close(self) -> None:
        """Free all that the session holds. Arrays that were kept stay valid.

        No error is raised: what cannot be freed is logged.
        """
        with self._lock:
            self._free()

    def _check(self, feeds: Mapping[str, Array]) -> None:
        dtypes = self._parts.plan.dtypes
        for name in self.inputs:
            if name not in feeds:
                raise InputError(f"the plan takes {name}, which was not given")
            if feeds[name].dtype != dtypes[name]:
                raise InputError(f"{name} must be {dtypes[name]}, got {feeds[name].dtype}")

    def _ready(self, shapes: Shapes, keep: Collection[str]) -> tuple[Binding, dict[str, DeviceArray]]:
        """The context of these shapes, and an array for each output to keep.

        If memory is short, the contexts of other shapes are given up for it.
        """
        try:
            return self._taken(shapes, keep)
        except OutOfDeviceMemory:
            if not self._parts.bindings.clear():
                raise
        self._parts.cuda.trim()
        return self._taken(shapes, keep)

    def _taken(self, shapes: Shapes, keep: Collection[str]) -> tuple[Binding, dict[str, DeviceArray]]:
        parts = self._parts
        binding = parts.bindings.get(shapes)
        return binding, {
            name: parts.cuda.take(shape, parts.plan.dtypes[name])
            for name, shape in binding.outputs.items()
            if name in keep
        }

    def _clean_up(self, binding: Binding | None) -> None:
        """Wait for what a failed run queued, which still uses the buffers, and forget its context."""
        with suppress(DitfError):
            self._parts.cuda("cudaStreamSynchronize", self._parts.stream)
        if binding is not None:
            with suppress(DitfError):
                self._parts.bindings.drop(binding)

    def _fetch(self, binding: Binding, kept: Mapping[str, DeviceArray]) -> dict[str, np.ndarray]:
        """Queue the copies of all outputs. Those that are not kept come in pinned memory."""
        parts = self._parts
        for name, array in kept.items():
            parts.buffers.fetch_into(array, name, parts.stream)
        return {
            name: parts.buffers.fetch(name, shape, parts.stream)
            for name, shape in binding.outputs.items()
            if name not in kept
        }


class _Parts:
    """What a session holds of the GPU and of TensorRT. It outlives the session and does not refer to it."""

    plan: LoadedPlan
    buffers: EngineBuffers
    bindings: Bindings
    watch: Stopwatch
    stream: Any

    def __init__(self, path: Path, cuda: Cuda) -> None:
        self._path = path
        self.cuda = cuda
        self._held = ExitStack()
        self._problems: list[Exception] = []

    def open(
        self, trt: Any, plan: Content, graph: Graph | None, kernels: Path | None, host_code: bool
    ) -> None:
        """Make everything, and note how it is freed: in reverse, as TensorRT requires."""
        cuda = self.cuda
        cuda.use()
        cuda.sessions.add(id(self))
        self._on_free(cuda.trim)
        self._on_free(lambda: cuda.sessions.discard(id(self)))
        self.stream = cuda("cudaStreamCreateWithFlags", 1)  # cudaStreamNonBlocking
        self._on_free(lambda: cuda("cudaStreamDestroy", self.stream))
        self.watch = Stopwatch(cuda, self.stream)
        self._on_free(self.watch.close)
        free, _ = cuda.memory
        self.plan = LoadedPlan(trt, self._path, plan, graph, host_code, free)
        self._on_free(self.plan.close)
        eager = "image" in self.plan.inputs  # a features plan meets few batch sizes
        contexts = ContextFactory(trt, self.plan.engine, kernels, eager)
        self._on_free(contexts.close)
        self._on_free(contexts.save_kernels)
        self.buffers = EngineBuffers(cuda, self.plan.dtypes)
        self._on_free(self.buffers.close)
        self.bindings = Bindings(self.plan, contexts, self.buffers, cuda, self.stream)
        self._on_free(self.bindings.clear)
        self._on_free(lambda: cuda("cudaStreamSynchronize", self.stream))

    def free(self) -> None:
        """Free everything, as far as possible: after an error the rest is still freed."""
        self._attempt(self.cuda.use)
        self._held.close()
        if self._problems:
            logger.warning("%s: the GPU's memory is not all freed: %s", self._path, self._problems[0])

    def _on_free(self, step: Callable[[], object]) -> None:
        self._held.callback(self._attempt, step)

    def _attempt(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:
            self._problems.append(error)
