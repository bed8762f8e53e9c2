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

    TensorRT-RTX compiles kernels on the machine that runs them. Where the library offers a cache for them, it
    is filled from a file, and `save_kernels` writes it back.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        engine: a deserialised engine.
        kernels: the file of compiled kernels; None for none.
    """

    def __init__(self, trt: Any, engine: Any, kernels: Path | None) -> None:
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine = engine
        self._config: Any = None
        self._kernels = kernels
        self._kernel_cache: Any = None
        keeps = has(trt, "IRuntimeCache")
        keeps = keeps and has(trt, "IRuntimeConfig.create_runtime_cache")
        keeps = keeps and has(trt, "IRuntimeConfig.set_runtime_cache")
        if kernels is not None and keeps:
            self._config = engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(self._strategy)
            self._kernel_cache = self._config.create_runtime_cache()
            try:
                content = read_cache(kernels)
            except OSError as error:
                content = None
                logger.warning(
                    "%s cannot be used (%s): kernels are compiled anew", error.filename, error.strerror
                )
            if content is not None and not self._kernel_cache.deserialize(content):
                logger.warning(
                    "%s is of another GPU or version, or damaged: kernels are compiled anew", kernels
                )
                self._kernel_cache.reset()
            self._config.set_runtime_cache(self._kernel_cache)

    def context(self) -> Any:
        """A new execution context; None if TensorRT refuses."""
        if self._config is not None:
            return self._engine.create_execution_context(self._config)
        return self._engine.create_execution_context(self._strategy)

    def save_kernels(self) -> None:
        """Write the compiled kernels to their file. If that fails, it is logged and no error is raised."""
        if self._kernel_cache is None or self._kernels is None:
            return
        try:
            write_cache(self._kernels, bytes(self._kernel_cache.serialize()))
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): kernels are compiled again", self._kernels, error.strerror
            )
