"""The execution contexts of a plan, one for each combination of input shapes, and their CUDA graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import ExitStack
from typing import Any

from ditf.runtime.backends.cuda import Cuda, GpuFailed, OutOfDeviceMemory
from ditf.runtime.backends.cuda_streams import capture
from ditf.runtime.backends.engine_buffers import EngineBuffers, Shapes
from ditf.runtime.backends.engine_contexts import ContextFactory
from ditf.runtime.backends.flavour import has
from ditf.runtime.backends.plan_loading import LoadedPlan
from ditf.runtime.errors import BundleError, DitfError, InputError

logger = logging.getLogger(__name__)

_FEWEST = 4  # contexts are kept however little memory is free
_MOST = 32
_FREE = 1 / 8  # of the GPU's memory is left free where more than _FEWEST contexts are kept


class Binding:
    """An execution context whose input shapes are set.

    Attributes:
        context: the context.
        shapes, outputs: the shapes of its inputs and of its outputs.
        scratch: the bytes of scratch memory that it needs.
        version: of the buffers whose addresses it has; None before it has any.
        runs: how often it ran at these addresses. A run that failed does not count.
        graph: the CUDA graph that was captured at these addresses, or None.
        capturable: whether a graph is to be captured.
    """

    def __init__(self, context: Any, shapes: Shapes, outputs: Shapes, scratch: int) -> None:
        self.context = context
        self.shapes = shapes
        self.outputs = outputs
        self.scratch = scratch
        self.version: int | None = None
        self.runs = 0
        self.graph: Any = None
        self.capturable = True


class Bindings:
    """The contexts of the shapes that were used last, bounded by number and by the GPU's free memory.

    A captured graph is tied to a context, so each combination of shapes has its own. All share the buffers,
    so only one runs at a time.

    Args:
        stream: the stream on which everything runs.
    """

    def __init__(
        self, plan: LoadedPlan, factory: ContextFactory, buffers: EngineBuffers, cuda: Cuda, stream: Any
    ) -> None:
        self._trt: Any = plan.trt
        self._plan = plan
        self._factory = factory
        self._buffers = buffers
        self._cuda = cuda
        self._stream = stream
        self._handle = int(stream)  # as TensorRT takes it
        self._kept: OrderedDict[tuple[Any, ...], Binding] = OrderedDict()
        self._said = False

    def get(self, shapes: Shapes) -> Binding:
        """The context of these input shapes, with memory for every tensor. The stream must be idle.

        Raises:
            InputError: no profile of the plan has these shapes.
            OutOfDeviceMemory: too little memory is free.
            BundleError: TensorRT refuses a context, a shape or an address.
        """
        key = tuple(shapes.values())
        if key not in self._kept:
            self._kept[key] = self._made(shapes)
        self._kept.move_to_end(key)
        binding = self._kept[key]
        if binding.version != self._buffers.version:
            self._place(binding)
        return binding

    def run(self, binding: Binding) -> None:
        """Queue a run: the first time directly, from the second time on as a CUDA graph.

        Raises:
            DitfError: TensorRT or the GPU refuses the run.
        """
        if binding.runs and binding.capturable and not self._factory.captures:
            if binding.graph is None:
                binding.graph = self._captured(binding)
            if binding.graph is not None:
                self._cuda("cudaGraphLaunch", binding.graph, self._stream)
                return
        self._enqueue(binding)

    def ran(self, binding: Binding) -> None:
        """Count a run that came to its end, and keep the kernels that were compiled for it."""
        binding.runs += 1
        first = binding.runs == 1
        if first and self._factory.captures and not self._is_capturable(binding.context):
            self._say("it allocates memory while it runs; build it again: ditf build --force")
        if first or (self._factory.lazy and binding.runs & (binding.runs - 1) == 0):  # 1, 2, 4, 8, ...
            self._factory.save_kernels()

    def drop(self, binding: Binding) -> None:
        """Forget a context, such as one whose run failed."""
        self._kept.pop(tuple(binding.shapes.values()), None)
        self._release(binding)

    def clear(self) -> bool:
        """Forget all contexts. Returns whether there were any."""
        kept = list(self._kept.values())
        self._kept.clear()
        with ExitStack() as stack:  # which goes on after an error
            for binding in kept:
                stack.callback(self._release, binding)
        return bool(kept)

    def _made(self, shapes: Shapes) -> Binding:
        plan = self._plan
        profile = plan.profile_of(shapes)
        if profile is None:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise InputError(f"{plan.path} was not built for {given}", "build it with another --batch")
        while len(self._kept) >= _MOST or (len(self._kept) >= _FEWEST and self._is_tight()):
            self.drop(next(iter(self._kept.values())))
        plan.log.last = "no message"  # what was said before is about something else
        context = self._factory.context()
        if context is None:
            raise self._refused("gives no execution context")
        if len(plan.profiles) > 1:
            self._check(context.set_optimization_profile_async(profile, self._handle), f"profile {profile}")
            self._cuda("cudaStreamSynchronize", self._stream)
        for name, shape in shapes.items():
            self._check(context.set_input_shape(name, shape), f"{name} of {list(shape)}")
        outputs = {name: tuple(int(n) for n in context.get_tensor_shape(name)) for name in plan.outputs}
        for name, shape in outputs.items():
            self._check(min(shape, default=0) >= 0, f"the input shapes, which give {name} no size")
        return Binding(context, shapes, outputs, plan.scratch_bytes(context, profile))

    def _place(self, binding: Binding) -> None:
        """Give a context the addresses of the buffers, which may have to grow for it."""
        binding.version = None
        self._forget_graph(binding)
        binding.runs = 0
        tensors = {**binding.shapes, **binding.outputs}
        self._buffers.reserve(tensors, binding.scratch)
        for name in tensors:
            placed = binding.context.set_tensor_address(name, self._buffers.address(name))
            self._check(placed, f"the address of {name}")
        if has(self._trt, "IExecutionContext.set_device_memory"):
            binding.context.set_device_memory(*self._buffers.scratch)
        else:  # before 10.4
            binding.context.device_memory = self._buffers.scratch[0]
        binding.version = self._buffers.version

    def _enqueue(self, binding: Binding) -> None:
        if not binding.context.execute_async_v3(self._handle):
            raise DitfError(
                f"{self._trt.__name__} cannot run {self._plan.path} ({self._plan.log.last})", "ditf check -v"
            )

    def _captured(self, binding: Binding) -> Any:
        """The graph of a run, or None if it cannot be captured."""
        try:
            return capture(self._cuda, self._stream, lambda: self._enqueue(binding))
        except GpuFailed:
            raise
        except DitfError as error:
            binding.capturable = False
            self._say(error.problem)
            return None

    def _is_capturable(self, context: Any) -> bool:
        asks = has(self._trt, "IExecutionContext.is_stream_capturable")
        return not asks or bool(context.is_stream_capturable(self._handle))

    def _say(self, why: str) -> None:
        if not self._said:
            logger.warning("%s runs without a CUDA graph: %s", self._plan.path, why)
        self._said = True

    def _is_tight(self) -> bool:
        free, total = self._cuda.memory
        return free < total * _FREE

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise self._refused(f"does not take {what}")

    def _refused(self, problem: str) -> DitfError:
        reason = self._plan.log.last
        if "outofmemory" in reason.lower().replace(" ", ""):  # TensorRT spells it both ways
            return OutOfDeviceMemory(
                f"{self._plan.path} {problem} ({reason}), {self._cuda.memory[0] / 1e6:.0f} MB are free",
                "free some, or use a smaller --size or --batch, an earlier --layer, or --ensemble 1",
            )
        return BundleError(f"{self._plan.path} {problem} ({reason})", "build it again on this machine")

    def _release(self, binding: Binding) -> None:
        try:
            self._forget_graph(binding)
        finally:
            binding.context = None

    def _forget_graph(self, binding: Binding) -> None:
        graph, binding.graph = binding.graph, None
        if graph is not None:
            self._cuda("cudaGraphExecDestroy", graph)
