"""The backends that run engines: TensorRT and TensorRT-RTX, which differ in their flavour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditf.runtime.backends import Probe
from ditf.runtime.backends.cuda import no_driver, open_cuda
from ditf.runtime.backends.engine_records import PLANS, EngineRecord, choose_engine, has_engine
from ditf.runtime.backends.engine_session import EngineSession
from ditf.runtime.backends.flavour import load_flavour
from ditf.runtime.backends.gpu import Gpu, find_gpu
from ditf.runtime.backends.plan_loading import plan_content
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError, MissingComponent, NoPlan
from ditf.runtime.files.user_cache import cache_file


class EngineBackend:
    """One of the two TensorRT backends; see `ditf.runtime.backends.Backend`.

    Args:
        flavour: "tensorrt" or "tensorrt-rtx".
    """

    def __init__(self, flavour: str) -> None:
        self._flavour = flavour

    def probe(self) -> Probe:
        """Find out whether a driver answers, and whether the library and cuda-python import."""
        try:
            gpu = find_gpu()
            if gpu is None:
                raise no_driver("libcuda")
            trt = load_flavour(self._flavour)
            open_cuda(0)
        except MissingComponent as error:
            return Probe(False, error.problem, error.fix)
        return Probe(True, f"{self._flavour} {trt.__version__}, {gpu}")

    def prepared(self, bundle: Bundle) -> bool:
        """Whether the bundle has an engine of this flavour, even one that does not fit this machine."""
        return has_engine(bundle, self._flavour)

    def ready(self, bundle: Bundle) -> None:
        """Check whether the bundle can run here; the cheap checks come first.

        Raises:
            MissingComponent: the driver, the library or cuda-python is missing.
            BundleError: no engine of the bundle fits this machine.
        """
        self._select(bundle)
        open_cuda(0)

    def open_session(self, bundle: Bundle, graph: str) -> EngineSession:
        """Open the engine that was built from one of the bundle's graphs.

        Raises:
            MissingComponent, BundleError: as `ready`; BundleError also if TensorRT refuses the plan.
            NoPlan: the engine was built without this graph.
            OutOfDeviceMemory: the engine does not fit into the GPU's free memory.
        """
        trt, gpu, folder, record = self._select(bundle)
        plan = PLANS[graph]
        if plan in record.left_out:
            raise NoPlan(f"{folder.name} has no {plan}: {record.left_out[plan]}", "match with numpy")
        refitted_from = bundle.read_graph(graph) if record.options.get("strip_weights") else None
        detail = f"{self._flavour} {trt.__version__}, {gpu}, {folder.name}"
        kernels = cache_file("kernels", folder.name, str(gpu), plan)
        host_code = bundle.trust.host_code and record.host_code
        with plan_content(record.plan(folder, plan), bundle.trust) as content:
            return EngineSession(trt, folder / plan, content, detail, refitted_from, kernels, host_code)

    def _select(self, bundle: Bundle) -> tuple[Any, Gpu, Path, EngineRecord]:
        gpu = find_gpu()
        if gpu is None:
            raise no_driver("libcuda")
        if not self.prepared(bundle):
            raise BundleError(
                f"{bundle.path} has no {self._flavour} engine",
                f"run: ditf build {bundle.path} --backend {self._flavour}",
            )
        trt = load_flavour(self._flavour)
        folder, record = choose_engine(bundle, self._flavour, gpu, trt.__version__)
        return trt, gpu, folder, record
