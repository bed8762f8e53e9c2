"""The backends that run engines: TensorRT and TensorRT-RTX, which differ in their flavour."""

from __future__ import annotations

from ditf.runtime.backends import Probe
from ditf.runtime.backends.cuda import no_driver, open_cuda
from ditf.runtime.backends.device import Device
from ditf.runtime.backends.engine_records import PLANS, build_command, choose_engine, has_engine
from ditf.runtime.backends.engine_session import EngineSession
from ditf.runtime.backends.flavour import RTX, has_rtx, load_flavour
from ditf.runtime.backends.gpu import Gpu, find_gpu
from ditf.runtime.backends.plan_loading import plan_content
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError, MissingComponent, NoPlan
from ditf.runtime.files.user_cache import cache_file


class EngineBackend:
    """One of the two TensorRT backends; see `ditf.runtime.backends.Backend`.

    Args:
        flavour: "tensorrt" or "tensorrt-rtx".
        device: the GPU; None for the first.
    """

    def __init__(self, flavour: str, device: Device | None = None) -> None:
        self._flavour = flavour
        self._index = 0 if device is None or device.index is None else device.index

    def probe(self) -> Probe:
        """Find out whether a driver answers, and whether the library and cuda-python import."""
        try:
            gpu = self._gpu()
            if self._flavour == RTX and not has_rtx(gpu):
                return Probe(False, f"TensorRT-RTX has no target for {gpu}", "use TensorRT or ONNX Runtime")
            trt = load_flavour(self._flavour)
            open_cuda(self._index)
        except MissingComponent as error:
            return Probe(False, error.problem, error.fix)
        return Probe(True, f"{self._flavour} {trt.__version__}, {gpu}")

    def prepared(self, bundle: Bundle) -> bool:
        """Whether the bundle has an engine of this flavour, even one that does not fit this machine."""
        return has_engine(bundle, self._flavour)

    def open_session(self, bundle: Bundle, graph: str) -> EngineSession:
        """Open the engine that was built from one of the bundle's graphs; the cheap checks come first.

        Raises:
            MissingComponent: the driver, the library or cuda-python is missing.
            BundleError: no engine of the bundle fits this GPU, or TensorRT refuses the plan.
            NoPlan: the engine was built without this graph.
            OutOfDeviceMemory: the engine does not fit into the GPU's free memory.
        """
        gpu = self._gpu()
        fix = build_command(bundle, self._flavour, gpu)
        if self._flavour == RTX and not has_rtx(gpu):
            raise BundleError(f"TensorRT-RTX has no target for {gpu}", fix)
        if not self.prepared(bundle):
            raise BundleError(f"{bundle.path} has no {self._flavour} engine", fix)
        trt = load_flavour(self._flavour)
        folder, record = choose_engine(bundle, self._flavour, gpu, trt.__version__)
        plan = PLANS[graph]
        if plan in record.left_out:
            raise NoPlan(f"{folder.name} has no {plan}: {record.left_out[plan]}", "match with numpy")
        open_cuda(self._index)  # an error about the installation comes before long reads
        refitted_from = bundle.read_graph(graph) if record.options.get("strip_weights") else None
        kernels = cache_file("kernels", folder.name, str(gpu), plan)
        with plan_content(record.plan(folder, plan), bundle.trust) as content:
            return EngineSession(
                trt,
                folder / plan,
                content,
                f"{self._flavour} {trt.__version__}, {gpu}, {folder.name}",
                refitted_from,
                kernels,
                bundle.trust.host_code and record.host_code,
                device=self._index,
            )

    def _gpu(self) -> Gpu:
        gpu = find_gpu(self._index)
        if gpu is None:
            raise no_driver("libcuda")
        return gpu
