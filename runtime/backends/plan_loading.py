"""Deserialising a plan: asking whether it runs here, loading it, and restoring weights that were stripped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ditf.runtime.backends.cuda import OutOfDeviceMemory
from ditf.runtime.backends.flavour import Log, has
from ditf.runtime.backends.graph_loading import refit
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.bundles.signing import Trust
from ditf.runtime.errors import BundleError
from ditf.runtime.files.hashed import Content, HashedFile

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "INT8": "int8", "BOOL": "bool",
}  # fmt: skip
_BUILD_AGAIN = "build it again on this machine: ditf build --force"

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@contextmanager
def plan_content(plan: HashedFile, trust: Trust) -> Iterator[Content]:
    """The checked content of a plan.

    It is mapped, because the CPU and the GPU of a Jetson share their memory, and a plan can fill half of it.
    Where a signature is required, it is read into memory instead, so that nobody can change it after the
    check. Without a signature that would protect from nothing: who can write the plan can write its hash.

    Raises:
        BundleError: the plan is missing, truncated or altered.
    """
    if trust.signers is not None:
        yield plan.read()
        return
    with plan.mapped() as content:
        yield content


class LoadedPlan:
    """A deserialised plan, and what it says about itself.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        path: the plan's file, for messages.
        content: the plan's verified bytes. They are not needed afterwards.
        graph: the graph that a plan without weights is refitted from; None for a plan that has its weights.
        host_code: allow the plan to run code of its own on the CPU.
        free_bytes: free GPU memory.

    Attributes:
        trt, path: as given.
        log: what TensorRT says.
        engine: the engine; None after `close`.
        inputs, outputs: {name: shape}; a dynamic dimension is None.
        dtypes: {name: dtype} of both.
        profiles: {input: (smallest shape, largest shape)} of each profile.

    Raises:
        BundleError: TensorRT refuses the plan, or the graph's weights do not fit it.
        OutOfDeviceMemory: the engine does not fit into the free memory.
    """

    def __init__(
        self,
        trt: Any,
        path: Path,
        content: Content,
        graph: Graph | None,
        host_code: bool,
        free_bytes: int,
    ) -> None:
        self.trt = trt
        self.path = path
        self.log = Log(trt)
        self._runtime: Any = trt.Runtime(self.log.logger)
        self._runtime.engine_host_code_allowed = host_code
        self.engine: Any = None
        try:
            self.engine = _deserialised(trt, self._runtime, self.log, path, content, free_bytes)
            if graph is not None:
                _restore_weights(trt, self.engine, self.log, path, graph)
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        trt = self.trt
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        shapes = {
            name: tuple(None if size < 0 else int(size) for size in self.engine.get_tensor_shape(name))
            for name in names
        }
        self.dtypes = {name: _dtype(self.engine.get_tensor_dtype(name).name) for name in names}
        self.inputs = {name: shapes[name] for name in names if modes[name] == trt.TensorIOMode.INPUT}
        self.outputs = {name: shapes[name] for name in names if modes[name] == trt.TensorIOMode.OUTPUT}
        self.profiles = tuple(self._profile(i) for i in range(self.engine.num_optimization_profiles))

    def _profile(self, index: int) -> Profile:
        shapes = {}
        for name in self.inputs:
            smallest, _, largest = self.engine.get_tensor_profile_shape(name, index)
            shapes[name] = (tuple(smallest), tuple(largest))
        return shapes

    def profile_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The first profile that has these input shapes, or None."""
        return next((i for i, profile in enumerate(self.profiles) if _within(shapes, profile)), None)

    def scratch_bytes(self, context: Any, profile: int) -> int:
        """The scratch memory that a context needs, whose profile and input shapes are set."""
        engine, trt = self.engine, self.trt
        if any(None in shape for shape in self.inputs.values()):
            needed = int(context.update_device_memory_size_for_shapes())
            if needed:  # 0 stands for a failure, too
                return needed
            if has(trt, "ICudaEngine.get_device_memory_size_for_profile_v2"):
                return int(engine.get_device_memory_size_for_profile_v2(profile))
        if has(trt, "ICudaEngine.device_memory_size_v2"):
            return int(engine.device_memory_size_v2)
        return int(engine.device_memory_size)  # before 10.1

    def close(self) -> None:
        """Free the engine. All that was made of it must be gone."""
        self.engine = None
        self._runtime = None


def _deserialised(trt: Any, runtime: Any, log: Log, path: Path, content: Content, free_bytes: int) -> Any:
    wrong = invalidity(trt, runtime, content)
    if wrong and "INSUFFICIENT_GPU_MEMORY" not in wrong:
        raise BundleError(f"{trt.__name__} cannot run {path} here ({', '.join(wrong)})", _BUILD_AGAIN)
    engine = None if wrong else runtime.deserialize_cuda_engine(content)
    if engine is None and (wrong or len(content) > free_bytes):
        raise OutOfDeviceMemory(
            f"{path} needs more than {len(content) / 1e6:.0f} MB of GPU memory,"
            f" {free_bytes / 1e6:.0f} MB are free",
            "free some, or export a smaller bundle: an earlier --layer, --precision int8",
        )
    if engine is None:
        raise BundleError(f"{trt.__name__} refuses {path} ({log.last})", _BUILD_AGAIN)
    return engine


def _restore_weights(trt: Any, engine: Any, log: Log, path: Path, graph: Graph) -> None:
    refitter = trt.Refitter(engine, log.logger)
    if not (refit(trt, refitter, log.logger, graph) and refitter.refit_cuda_engine()):
        raise BundleError(
            f"the weights of {graph.path} do not fit {path} ({log.last})",
            "build it again without --strip-weights",
        )


def invalidity(trt: Any, runtime: Any, plan: Content) -> list[str]:
    """The reasons in a plan's header why it cannot run here, as TensorRT-RTX names them.

    Nothing is deserialised. Full TensorRT has no such query: the list is empty, and engine.json decides.
    """
    if not has(trt, "Runtime.get_engine_validity") or not has(trt, "EngineInvalidityDiagnostics"):
        return []
    _, found = runtime.get_engine_validity(plan)
    diagnostics = trt.EngineInvalidityDiagnostics
    names = [name for name in dir(diagnostics) if name.isupper()]
    return [name for name in names if int(found) & int(getattr(diagnostics, name))]


def _within(shapes: Mapping[str, tuple[int, ...]], profile: Profile) -> bool:
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
