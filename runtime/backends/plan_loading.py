"""Deserialising a plan: asking whether it runs here, loading it, and restoring weights that were stripped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditf.runtime.backends.cuda import OutOfDeviceMemory
from ditf.runtime.backends.flavour import Log, has
from ditf.runtime.backends.graph_loading import refit
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError


def load_plan(
    trt: Any, runtime: Any, log: Log, path: Path, content: bytes, graph: Graph | None, free_bytes: int
) -> Any:
    """Deserialise a plan into an engine.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        runtime: its Runtime, which logs to `log`.
        path: the plan's file, for messages.
        content: the plan's verified bytes.
        graph: the graph that a plan without weights is refitted from; None for a plan that has its weights.
        free_bytes: free GPU memory.

    Raises:
        BundleError: TensorRT refuses the plan, or the graph's weights do not fit it.
        OutOfDeviceMemory: the engine does not fit into the free memory.
    """
    needed = len(content)
    wrong = invalidity(trt, runtime, content)
    if wrong and "INSUFFICIENT_GPU_MEMORY" not in wrong:
        raise BundleError(
            f"{trt.__name__} cannot run {path} here ({', '.join(wrong)})",
            "build it again on this machine: ditf build --force",
        )
    engine = None if wrong else runtime.deserialize_cuda_engine(content)
    if engine is None:
        if wrong or needed > free_bytes:
            raise OutOfDeviceMemory(
                f"{path} needs more than {needed / 1e6:.0f} MB of GPU memory,"
                f" {free_bytes / 1e6:.0f} MB are free",
                "free some, or export a smaller bundle: an earlier --layer, --precision int8",
            )
        raise BundleError(
            f"{trt.__name__} refuses {path} ({log.last})",
            "build it again on this machine: ditf build --force",
        )
    if graph is not None:
        refitter = trt.Refitter(engine, log.logger)
        if not (refit(trt, refitter, log.logger, graph) and refitter.refit_cuda_engine()):
            raise BundleError(
                f"the weights of {graph.path} do not fit {path} ({log.last})",
                "build it again without --strip-weights",
            )
    return engine


def invalidity(trt: Any, runtime: Any, plan: bytes) -> list[str]:
    """The reasons in a plan's header why it cannot run here, as TensorRT-RTX names them.

    Nothing is deserialised. Full TensorRT has no such query: the list is empty, and engine.json decides.
    """
    if not has(trt, "Runtime.get_engine_validity") or not has(trt, "EngineInvalidityDiagnostics"):
        return []
    _, found = runtime.get_engine_validity(plan)
    diagnostics = trt.EngineInvalidityDiagnostics
    names = [name for name in dir(diagnostics) if name.isupper()]
    return [name for name in names if int(found) & int(getattr(diagnostics, name))]
