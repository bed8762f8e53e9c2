"""Making execution contexts of an engine, and keeping the kernels that TensorRT-RTX compiles for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ditf.runtime.backends.flavour import has
from ditf.runtime.files.user_cache import read_cache, write_cache

logger = logging.getLogger(__name__)


class ContextFactory:
    """Makes an engine's execution contexts, whose scratch memory the caller provides.

    TensorRT-RTX compiles kernels on the machine that runs them. For dynamic shapes it can compile those of a
    shape before the shape's first run (eager), or behind the first runs, which use slower kernels meanwhile
    (lazy). It captures CUDA graphs itself, when the kernels of the shape are there, and captures again when
    an address changes. The kernels are kept in a file between processes.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        engine: a deserialised engine.
        kernels: the file of compiled kernels; None for none.
        eager: compile eagerly. This suits a plan that meets few shapes.

    Attributes:
        captures: whether the contexts capture CUDA graphs themselves.
        lazy: whether kernels may be compiled after the first run of a shape.
    """

    def __init__(self, trt: Any, engine: Any, kernels: Path | None, eager: bool) -> None:
        self._engine = engine
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config: Any = None
        self._kernels = kernels
        self._kernel_cache: Any = None
        self._saved_bytes = 0
        self.captures = has(trt, "CudaGraphStrategy") and has(trt, "IRuntimeConfig.cuda_graph_strategy")
        self.lazy = self.captures and not eager
        if not self.captures:
            return
        self._config = engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(self._strategy)
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        specialises = has(trt, "DynamicShapesKernelSpecializationStrategy")
        if specialises and has(trt, "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy"):
            self._config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
                if eager
                else trt.DynamicShapesKernelSpecializationStrategy.LAZY
            )
        keeps = has(trt, "IRuntimeConfig.create_runtime_cache")
        keeps = keeps and has(trt, "IRuntimeConfig.set_runtime_cache") and has(trt, "IRuntimeCache")
        if kernels is not None and keeps:
            self._use_kernels(kernels)

    def _use_kernels(self, kernels: Path) -> None:
        self._kernel_cache = self._config.create_runtime_cache()
        content = None
        try:
            content = read_cache(kernels)
        except OSError as error:
            logger.warning(
                "%s cannot be used (%s): kernels are compiled anew", error.filename, error.strerror
            )
        if content is not None and self._kernel_cache.deserialize(content):
            self._saved_bytes = len(content)
        elif content is not None:
            logger.warning("%s is of another GPU or version, or damaged: kernels are compiled anew", kernels)
            self._kernel_cache.reset()
        if not self._config.set_runtime_cache(self._kernel_cache):
            logger.warning("TensorRT-RTX takes no kernel cache: kernels are compiled by every process")
            self._kernel_cache = None

    def context(self) -> Any:
        """A new execution context; None if TensorRT refuses."""
        if self._config is not None:
            return self._engine.create_execution_context(self._config)
        return self._engine.create_execution_context(self._strategy)

    def save_kernels(self) -> None:
        """Write the compiled kernels to their file if there are more than it holds.

        Nothing is raised if that fails: it is logged, and not tried again.
        """
        if self._kernel_cache is None or self._kernels is None:
            return
        content = bytes(self._kernel_cache.serialize() or b"")
        if len(content) <= self._saved_bytes:
            return
        try:
            write_cache(self._kernels, content)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): kernels are compiled by every process",
                self._kernels,
                error.strerror,
            )
            self._kernels = None
        self._saved_bytes = len(content)

    def close(self) -> None:
        """Let go of the cache, the configuration and the engine. The contexts must be gone."""
        self._kernel_cache = None
        self._config = None
        self._engine = None
