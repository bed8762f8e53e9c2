"""TensorRT-RTX compiles kernels on the machine that runs them: the cache that keeps them, and the config."""

from __future__ import annotations

import json
from typing import Any

from tests.standin.world import World

_MAGIC = b"standin-kernels:"


class RuntimeCache:
    """Compiled kernels by name. A blob of another device or library version is refused."""

    def __init__(self, world: World, environment: str) -> None:
        self._world = world
        self._environment = environment
        self.kernels: set[str] = set()

    def serialize(self) -> Any:
        if self._world.refused("IRuntimeCache.serialize"):
            return None
        return _MAGIC + json.dumps([self._environment, sorted(self.kernels)]).encode()

    def deserialize(self, blob: Any) -> bool:
        content = bytes(blob)
        if not content.startswith(_MAGIC):
            return False
        try:
            environment, kernels = json.loads(content[len(_MAGIC) :])
        except ValueError:
            return False
        if environment != self._environment:
            return False
        self.kernels = set(kernels)
        return True

    def reset(self) -> None:
        self.kernels = set()


class RuntimeConfig:
    """How contexts are made. Enumerations are those of the library."""

    def __init__(self, world: World, trt: Any, environment: str) -> None:
        self._world = world
        self._environment = environment
        self.strategy = trt.ExecutionContextAllocationStrategy.STATIC
        self.cache: RuntimeCache | None = None
        rtx = hasattr(trt, "CudaGraphStrategy")
        self.graphs = trt.CudaGraphStrategy.DISABLED if rtx else None
        self.specialisation = trt.DynamicShapesKernelSpecializationStrategy.LAZY if rtx else None

    @property
    def cuda_graph_strategy(self) -> Any:
        return self.graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: Any) -> None:
        self.graphs = strategy

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> Any:
        return self.specialisation

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, strategy: Any) -> None:
        self.specialisation = strategy

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self.strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._world, self._environment)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> RuntimeCache | None:
        return self.cache
