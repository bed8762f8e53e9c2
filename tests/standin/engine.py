"""Runtime, engine and execution context of TensorRT on the stand-in."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import numpy as np

from tests.standin import registry
from tests.standin.graph_session import GraphSession, Shape
from tests.standin.kernels import RuntimeCache, RuntimeConfig
from tests.standin.memory import Illegal
from tests.standin.streams import Stream
from tests.standin.world import World

_ALIGNMENT = 256
_numbers = itertools.count()


class Runtime:
    """Deserialises plans that the registry knows.

    Args:
        world, trt: set by the module that offers this class.
        logger: the process's logger; TensorRT keeps the first one that it is given.
    """

    world: World
    trt: Any
    engine_host_code_allowed = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        note_logger(self.world, logger)
        self._key = alive(self.world, self, "runtime")

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        if self.world.refused("deserialize_cuda_engine"):
            log(self.world, self.trt, "deserialisation was made to fail")
            return None
        found = registry.find(serialized_engine)
        if found is None:
            log(self.world, self.trt, "the plan is not one of this library")
            return None
        if "VERSION_COMPATIBLE" in found[1].flags and not self.engine_host_code_allowed:
            log(self.world, self.trt, "the plan has host code, which is not allowed")
            return None
        nbytes = memoryview(serialized_engine).nbytes
        address = self.world.memory.allocate(nbytes, self.world.device)
        if not address:
            log(self.world, self.trt, "out of device memory")
            return None
        return self.trt.ICudaEngine(self, registry.digest(serialized_engine), *found, address)

    def get_engine_validity(self, plan: Any) -> tuple[Any, int]:
        """RTX only: (EngineValidity, reasons as bits)."""
        reasons = self.trt.EngineInvalidityDiagnostics
        found = registry.find(plan)
        if found is None:
            return self.trt.EngineValidity.INVALID, int(reasons.MALFORMED_ENGINE)
        capability = "sm_{}{}".format(*self.world.models[self.world.device].capability)
        portable = ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
        supported = portable if found[1].target == "portable" else (found[1].target,)
        if found[1].target and capability not in supported:
            return self.trt.EngineValidity.INVALID, int(reasons.UNSUPPORTED_CC)
        return self.trt.EngineValidity.VALID, 0


class Engine:
    """A deserialised plan; its weights take device memory until it is gone."""

    num_io_tensors = 0
    num_optimization_profiles = 1

    def __init__(
        self, runtime: Runtime, digest: str, model: bytes, built: registry.Built, address: int
    ) -> None:
        self.world, self.trt = runtime.world, runtime.trt
        self.digest = digest
        self.built = built
        self.model = model
        self.device = self.world.device
        self.refitted = "STRIP_PLAN" not in built.flags
        self.session = GraphSession(model)
        self.children: weakref.WeakSet[Any] = weakref.WeakSet()
        self._runtime = weakref.ref(runtime)
        self.num_io_tensors = len(self.session.inputs) + len(self.session.outputs)
        self.num_optimization_profiles = max(1, len(built.profiles))
        self._key = alive(self.world, self, "engine")
        weakref.finalize(self, _release_memory, self.world, address)

    def __del__(self) -> None:
        for kind in sorted({type(one).__name__ for one in self.children}):
            self.world.fault(f"the engine was destroyed before its {kind}")
        if self._runtime() is None:
            self.world.fault("the runtime was destroyed before its engine")

    def get_tensor_name(self, index: int) -> str:
        return [*self.session.inputs, *self.session.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.trt.TensorIOMode
        return modes.INPUT if name in self.session.inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        dtype, _ = {**self.session.inputs, **self.session.outputs}[name]
        types = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64", "uint8": "UINT8",
                 "int8": "INT8", "bool": "BOOL"}  # fmt: skip
        return getattr(self.trt.DataType, types[dtype.name])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        _, dimensions = {**self.session.inputs, **self.session.outputs}[name]
        return tuple(-1 if isinstance(size, str) else size for size in dimensions)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        if self.built.profiles and name in self.built.profiles[profile_index]:
            return [tuple(shape) for shape in self.built.profiles[profile_index][name]]
        return [self.get_tensor_shape(name)] * 3

    @property
    def device_memory_size_v2(self) -> int:
        return self._largest_scratch()

    def _largest_scratch(self) -> int:
        return max(self._profile_scratch(i) for i in range(self.num_optimization_profiles))

    @property
    def device_memory_size(self) -> int:  # of 10.x
        return self._largest_scratch()

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._profile_scratch(profile_index)

    def _profile_scratch(self, profile_index: int) -> int:
        shapes = {name: self.get_tensor_profile_shape(name, profile_index)[2] for name in self.session.inputs}
        return scratch_bytes(self.session, shapes)

    def create_runtime_config(self) -> RuntimeConfig:
        config = self.trt.IRuntimeConfig(self.world, self.trt, self._environment)
        self.children.add(config)
        return config

    def create_execution_context(self, arg: Any = None) -> Context | None:
        if self.world.refused("create_execution_context"):
            log(self.world, self.trt, "the context was made to fail")
            return None
        context = self.trt.IExecutionContext(self, arg)
        self.children.add(context)
        return context

    @property
    def _environment(self) -> str:
        model = self.world.models[self.device]
        return f"{model.name} {model.capability} {self.trt.__version__}"


class Context:
    """An execution context. It refuses to run unless everything was set, and logs what is missing."""

    def __init__(self, engine: Engine, arg: Any) -> None:
        trt = engine.trt
        self._engine = weakref.ref(engine)
        self.world, self.trt = engine.world, trt
        self._config = arg if isinstance(arg, RuntimeConfig) else None
        strategy = arg if self._config is None else self._config.strategy
        strategies = trt.ExecutionContextAllocationStrategy
        self._user_managed = strategy == strategies.USER_MANAGED
        self._own_scratch = 0
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._profile = 0 if engine.num_optimization_profiles == 1 else -1
        self._memory_asked = False
        self._kernels: set[str] = set()
        self._compiling: set[str] = set()
        self._runs = 0
        self._graph: Any = None  # what the graph that the library captured holds; it keeps one for a context
        if not self._user_managed:
            self._own_scratch = self.world.memory.allocate(engine._largest_scratch(), engine.device)
            weakref.finalize(self, _release_memory, self.world, self._own_scratch)
        for name in engine.session.inputs:
            shape = engine.get_tensor_shape(name)
            if -1 not in shape:
                self._shapes[name] = shape
        self._key = alive(self.world, self, "execution context")

    @property
    def engine(self) -> Engine:
        engine = self._engine()
        if engine is None:
            self.world.fault("a context was used after its engine was destroyed")
            raise RuntimeError("no engine")
        return engine

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._refuse(f"there is no profile {profile_index}")
        if self.world.refused("set_optimization_profile_async"):
            return self._refuse("the profile was made to fail")
        self._profile = profile_index
        self._shapes = {name: shape for name, shape in self._shapes.items()
                        if -1 not in self.engine.get_tensor_shape(name)}  # fmt: skip
        self.world.streams[int(stream_handle)].put(lambda: None)
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if self.world.refused("set_input_shape"):
            return self._refuse("the shape was made to fail")
        if self._profile < 0:
            return self._refuse("no profile was chosen")
        if name not in self.engine.session.inputs:
            return self._refuse(f"{name} is no input")
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, self._profile)
        shape = tuple(int(size) for size in shape)
        fits = len(shape) == len(smallest)
        fits = fits and all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True))
        if not fits:
            return self._refuse(f"{name} {shape} is outside of the profile {smallest} to {largest}")
        self._shapes[name] = shape
        self._memory_asked = False
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self._shapes:
            return self._shapes[name]
        if set(self._shapes) != set(self.engine.session.inputs):
            return tuple(self.engine.get_tensor_shape(name))
        return self.engine.session.output_shapes(self._shapes)[name]

    def infer_shapes(self) -> list[str]:
        return self._unset()

    def _unset(self) -> list[str]:
        return [name for name in self.engine.session.inputs if name not in self._shapes]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self.world.refused("set_tensor_address"):
            return self._refuse("the address was made to fail")
        if name not in self.engine.session.inputs and name not in self.engine.session.outputs:
            return self._refuse(f"there is no tensor {name}")
        if int(memory) % _ALIGNMENT:
            return self._refuse(f"the address of {name} is not aligned")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def update_device_memory_size_for_shapes(self) -> int:
        if self._unset():
            return 0
        self._memory_asked = True
        return scratch_bytes(self.engine.session, self._shapes)

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self._user_managed:
            self.world.fault("scratch memory was given to a context that has its own")
        self._scratch = (int(memory), int(size))

    @property
    def device_memory(self) -> int:
        return self._scratch[0]

    @device_memory.setter
    def device_memory(self, memory: int) -> None:  # before 10.4; it names no size
        engine = self.engine
        asked = self._memory_asked
        size = scratch_bytes(engine.session, self._shapes) if asked else engine._largest_scratch()
        self._scratch = (int(memory), size)

    def is_stream_capturable(self, stream: int) -> bool:
        return "REQUIRE_USER_ALLOCATION" in self.engine.built.flags

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.world.refused("execute_async_v3"):
            return self._refuse("the run was made to fail")
        engine = self.engine
        stream = self.world.streams.get(int(stream_handle))
        if stream is None:
            self.world.fault("a run on a stream that does not exist")
            return self._refuse("no such stream")
        missing = self._missing(engine)
        if missing:
            return self._refuse(missing)
        if not self._compiled(engine, stream):
            return False
        self._capture_by_itself(engine)
        landed = self._share_no_scratch(stream)
        stream.put(self._work(engine, dict(self._shapes), dict(self._addresses), self._scratch, stream))
        if landed is not None:
            stream.put(landed)
        return True

    def _share_no_scratch(self, stream: Stream) -> Any:
        """Runs of two streams may overlap, so that they must not have the same scratch memory.

        Returns the work that ends the claim to it, to be queued behind the run; None if there is none.
        """
        address, size = self._scratch
        if not address or stream.capture is not None:
            return None
        flying = self.world.scratch_in_flight
        for other, start, nbytes in flying:
            if other != stream.handle and start < address + size and address < start + nbytes:
                self.world.fault("two runs in flight share scratch memory")
        mine = (stream.handle, address, size)
        flying.append(mine)
        return lambda: flying.remove(mine)

    def _capture_by_itself(self, engine: Engine) -> None:
        """TensorRT-RTX's own graphs: from the second run on, and only of kernels that are no fallback."""
        self._runs += 1
        strategy = None if self._config is None else self._config.graphs
        if strategy is None or strategy != self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            return
        if self._runs == 1 or not self._kernels.issuperset(self._needed(engine)):
            return
        if "REQUIRE_USER_ALLOCATION" not in engine.built.flags:
            return
        graph = (dict(self._shapes), dict(self._addresses), self._scratch)
        self.world.own_graphs["replayed" if graph == self._graph else "captured"] += 1
        self._graph = graph

    def _missing(self, engine: Engine) -> str:
        if self._profile < 0:
            return "no profile was chosen"
        for name in engine.session.inputs:
            if name not in self._shapes:
                return f"the shape of {name} was not set"
        for name in (*engine.session.inputs, *engine.session.outputs):
            address = self._addresses.get(name, 0)
            if not address:
                return f"the address of {name} was not set"
            if not self.world.memory.owns(address):
                self.world.fault(f"the address of {name} is on the host")
                return f"the address of {name} is on the host"
        if self._user_managed:
            address, size = self._scratch
            if not address or address % _ALIGNMENT:
                return "the scratch memory is missing or not aligned"
            if size < scratch_bytes(engine.session, self._shapes):
                return f"{size} bytes of scratch memory are too few"
        if not engine.refitted:
            return "the engine has no weights"
        return ""

    def _compiled(self, engine: Engine, stream: Stream) -> bool:
        """Compile the kernels that this run needs; a capture of kernels that are not compiled is a fault."""
        for kernel in self._needed(engine):
            cache = None if self._config is None else self._config.cache
            if kernel in self._kernels or (cache is not None and kernel in cache.kernels):
                self._kernels.add(kernel)
                continue
            if self._arrives_later(engine, kernel):
                continue
            if stream.capture is not None:
                self.world.fault(f"{kernel} was compiled during capture")
                stream.capture.invalid = True
                return self._refuse("kernels are compiled at the first run, which cannot be captured")
            self.world.compilations[kernel] += 1
            self._kernels.add(kernel)
            if isinstance(cache, RuntimeCache):
                cache.kernels.add(kernel)
        if stream.capture is not None and not self._specialised(engine):
            self.world.fault("a capture froze fallback kernels")
        return True

    def _arrives_later(self, engine: Engine, kernel: str) -> bool:
        """Whether a kernel is compiled behind this run, and there at the next one."""
        if self._specialised(engine) or kernel.endswith("fallback") or kernel in self._compiling:
            return False
        self._compiling.add(kernel)
        return True

    def _needed(self, engine: Engine) -> list[str]:
        if not hasattr(self.trt, "IRuntimeCache"):
            return [f"{engine.digest[:8]} {id(self)}"]  # full TensorRT: the first run of a context sets it up
        if not self._dynamic(engine):
            return [f"{engine.digest[:8]} static"]
        strategies = self.trt.DynamicShapesKernelSpecializationStrategy
        strategy = strategies.LAZY if self._config is None else self._config.specialisation
        needed = [f"{engine.digest[:8]} fallback"]
        if strategy != strategies.NONE:
            needed.append(f"{engine.digest[:8]} {sorted(self._shapes.items())}")
        return needed

    def _specialised(self, engine: Engine) -> bool:
        """Whether a capture would hold the fast kernels, and not those that run while they compile."""
        if not self._dynamic(engine) or not hasattr(self.trt, "IRuntimeCache"):
            return True
        strategies = self.trt.DynamicShapesKernelSpecializationStrategy
        strategy = strategies.LAZY if self._config is None else self._config.specialisation
        return bool(strategy == strategies.EAGER)

    def _dynamic(self, engine: Engine) -> bool:
        return any(-1 in engine.get_tensor_shape(name) for name in engine.session.inputs)

    def _work(
        self,
        engine: Engine,
        shapes: dict[str, Shape],
        addresses: dict[str, int],
        scratch: tuple[int, int],
        stream: Stream,
    ) -> Any:
        """The run as queued work: what it refers to is fixed now, as a captured graph fixes it."""
        world, session, device = self.world, engine.session, engine.device
        gone, me = self._engine, weakref.ref(self)

        def work() -> None:
            if gone() is None or me() is None:
                raise Illegal("a run of an engine or context that was destroyed")
            if stream.device != device:
                raise Illegal("a run on another device than the engine's")
            scribble(world, scratch)
            feeds = {
                name: world.memory.view(addresses[name], math.prod(shapes[name]) * dtype.itemsize)
                .view(dtype).reshape(shapes[name]).copy()
                for name, (dtype, _) in session.inputs.items()
            }  # fmt: skip
            for name, value in session.run(feeds).items():
                content = np.ascontiguousarray(value).view(np.uint8).reshape(-1)
                world.memory.view(addresses[name], content.nbytes)[...] = content
            scribble(world, scratch)

        return work

    def _refuse(self, why: str) -> bool:
        log(self.world, self.trt, why)
        return False


def scratch_bytes(session: GraphSession, shapes: dict[str, Shape]) -> int:
    """Scratch memory of a run, which grows with the shapes and is no multiple of the alignment."""
    return 1000 + sum(4 * math.prod(shapes[name]) for name in session.inputs)


def scribble(world: World, scratch: tuple[int, int]) -> None:
    """Overwrite scratch memory: nothing may rely on what it held."""
    address, size = scratch
    if address:
        world.memory.view(address, size)[...] = 0xA5


def alive(world: World, thing: Any, kind: str) -> int:
    """List a thing among what is alive until it is collected."""
    key = next(_numbers)
    world.engines[key] = kind
    weakref.finalize(thing, world.engines.pop, key, None)
    return key


def _release_memory(world: World, address: int) -> None:
    if address:
        for stream in list(world.streams.values()):
            if stream.queue:
                world.fault("an engine or context was destroyed while work was queued")
        world.memory.free(address)


def note_logger(world: World, logger: Any) -> None:
    if not any(logger is known for known in world.loggers):
        world.loggers.append(logger)


def log(world: World, trt: Any, message: str) -> None:
    """Report an error to the logger that TensorRT keeps: the first of the process."""
    if world.loggers:
        world.loggers[0].log(trt.ILogger.Severity.ERROR, message)
