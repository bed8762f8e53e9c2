"""What the two TensorRT backends share: whether they open here, and opening a bundle's engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditf.runtime.backends import Probe
from ditf.runtime.backends.cuda import no_driver, open_cuda
from ditf.runtime.backends.engine_records import PLANS, EngineRecord, choose_engine, engine_of
from ditf.runtime.backends.engine_session import EngineSession
from ditf.runtime.backends.flavour import load
from ditf.runtime.backends.gpu import Gpu, find_gpu
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import BundleError, MissingComponent, NoPlan
from ditf.runtime.files.user_cache import cache_file


def probe(flavour: str) -> Probe:
    """Whether a driver answers, and the flavour's library and cuda-python import."""
    try:
        gpu = find_gpu()
        if gpu is None:
            raise no_driver("libcuda")
        trt = load(flavour)
        open_cuda()
    except MissingComponent as error:
        return Probe(False, error.problem, error.fix)
    return Probe(True, f"{flavour} {trt.__version__}, {gpu}")


def prepared(flavour: str, bundle: Bundle) -> bool:
    """Whether a bundle has an engine of the flavour, fitting or not; nothing is imported."""
    return engine_of(bundle, flavour)


def ready(flavour: str, bundle: Bundle) -> None:
    """Ask whether a bundle can run here, what is cheap to know first.

    Raises:
        MissingComponent: no driver, library or cuda-python.
        BundleError: no engine that fits.
    """
    _select(flavour, bundle)
    open_cuda()


def open_session(flavour: str, bundle: Bundle, graph: str) -> EngineSession:
    """Open the engine of one of a bundle's graphs.

    Raises:
        MissingComponent, BundleError: see `ready`; or the plan is refused.
        NoPlan: the engine was built without this graph.
        OutOfDeviceMemory: it does not fit.
    """
    trt, gpu, folder, record = _select(flavour, bundle)
    plan = PLANS[graph]
    if plan in record.left_out:
        raise NoPlan(f"{folder.name} has no {plan}: {record.left_out[plan]}", "match with numpy")
    content = bytes(record.plan(folder, plan).read())
    refitted_from = bundle.read_graph(graph) if record.options.get("strip_weights") else None
    detail = f"{flavour} {trt.__version__}, {gpu}, {folder.name}"
    kernels = cache_file("kernels", folder.name, str(gpu), plan)
    return EngineSession(
        trt,
        folder / plan,
        content,
        detail,
        refitted_from,
        kernels,
        bundle.trust.host_code and record.host_code,
    )


def _select(flavour: str, bundle: Bundle) -> tuple[Any, Gpu, Path, EngineRecord]:
    gpu = find_gpu()
    if gpu is None:
        raise no_driver("libcuda")
    if not prepared(flavour, bundle):
        raise BundleError(
            f"{bundle.path} has no {flavour} engine", f"run: ditf build {bundle.path} --backend {flavour}"
        )
    trt = load(flavour)
    folder, record = choose_engine(bundle, flavour, gpu, trt.__version__)
    return trt, gpu, folder, record
