"""The registry of backends: what can run a bundle's graphs, and how each one is opened.

A backend is one file and one entry of `BACKENDS`. The file holds a class with the three methods of `Backend`.
The file is imported when the backend is asked for, and the library that it drives when a session opens. The
two TensorRT backends share a file and differ in an argument.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ditf.runtime.backends.device import Device, find_device
from ditf.runtime.bundles.bundle import FEATURES, Bundle
from ditf.runtime.errors import BundleError, InputError, MissingComponent


@dataclass(frozen=True)
class BackendEntry:
    """One backend of the registry.

    Attributes:
        name: the value of --backend that selects it.
        module: the module that holds its class.
        class_name: the class, which has the methods of `Backend`.
        arguments: what the class is made with, beside the device.
        platform: what the Open Inference Protocol's model metadata call the format that it runs.
        needs_gpu: whether it does not run on a CPU.
    """

    name: str
    module: str
    class_name: str
    arguments: tuple[str, ...]
    platform: str
    needs_gpu: bool


_HERE = "ditf.runtime.backends"
_ENTRIES = (
    *(
        BackendEntry(name, f"{_HERE}.engine", "EngineBackend", (name,), "tensorrt_plan", True)
        for name in ("tensorrt", "tensorrt-rtx")
    ),
    BackendEntry("onnxruntime", f"{_HERE}.onnxruntime", "OnnxRuntimeBackend", (), "onnxruntime_onnx", False),
)
BACKENDS = {entry.name: entry for entry in _ENTRIES}
"""The backends by name, in the order in which `auto` prefers them."""


@dataclass(frozen=True)
class Probe:
    """Whether a backend works on this machine.

    Attributes:
        available: whether it can open sessions.
        detail: its version and devices, or the reason why it cannot open.
        fix: the line that installs what is missing; empty if the backend is available.
    """

    available: bool
    detail: str
    fix: str = ""


class Session(Protocol):
    """An opened graph.

    Attributes:
        inputs, outputs: {name: shape} in the graph's order; a dynamic dimension is None.
        detail: the version and device that run it, for people.
        batches: the (smallest, largest) number of images of each profile; () if every size that `inputs`
            allows will do.
        device_seconds: the duration of the last run by the device's own clock; None if there is none.
        device_bytes: the device memory that the session holds; None if it is not known.
    """

    inputs: dict[str, tuple[int | None, ...]]
    outputs: dict[str, tuple[int | None, ...]]
    detail: str

    @property
    def batches(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def device_seconds(self) -> float | None: ...

    @property
    def device_bytes(self) -> int | None: ...

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Run the graph. Safe to call from several threads.

        Args:
            feeds: arrays in host memory, or arrays that an earlier run kept in device memory.
            keep: names of outputs that may stay in device memory; they have `shape`, `dtype` and `numpy()`.
        """

    def close(self) -> None:
        """Free what the session holds. It must not be run afterwards."""


class Backend(Protocol):
    """What runs a bundle's graphs."""

    def probe(self) -> Probe:
        """Find out whether the backend works on this machine, without opening a session."""

    def prepared(self, bundle: Bundle) -> bool:
        """Whether the bundle holds what this backend runs. Nothing is imported to answer this."""

    def open_session(self, bundle: Bundle, graph: str) -> Session:
        """Open features.onnx or match.onnx, or the engine that was built from it.

        Raises:
            MissingComponent, BundleError: this backend cannot run the bundle on this machine.
            DitfError: it could, but the GPU has too little free memory or has failed.
        """


@dataclass(frozen=True)
class Opened:
    """A backend that opened a bundle.

    Attributes:
        name: the backend's name.
        backend: what opens the bundle's other graphs.
        features: the session of features.onnx.
        reason: why this backend was chosen.
    """

    name: str
    backend: Backend
    features: Session
    reason: str


def open_features(bundle: Bundle, name: str | Backend = "auto", device: str | None = None) -> Opened:
    """Open features.onnx with the backend that runs a bundle.

    "auto" takes the first backend that opens the bundle. It goes on when the bundle has no engine that fits,
    and when TensorRT refuses the plan. It does not go on when the GPU's memory is too small or the GPU has
    failed: the next backend would need as much memory, or be a CPU that is many times slower.

    Args:
        name: "auto", a name of `BACKENDS`, or a backend object outside the registry, which is used as it is.
        device: "cpu", "cuda" or "cuda:N". By default an engine runs on the first GPU, and ONNX Runtime too if
            it can use it.

    Raises:
        InputError: the name or the device is unknown, or the named backend does not run on the CPU.
        MissingComponent: there is no such device, or the named backend is not available here, or, with
            "auto", none is.
        BundleError: the bundle has no engine that the named backend can run, or, with "auto", its own graphs
            are damaged.
        DitfError: the GPU's memory is too small, or the GPU has failed.
    """
    if not isinstance(name, str):
        return Opened(type(name).__name__, name, name.open_session(bundle, FEATURES), "given")
    if name not in ("auto", *BACKENDS):
        raise InputError(f"unknown backend {name!r}", f"choose auto or {', '.join(BACKENDS)}")
    place = None if device is None else find_device(device)
    on_cpu = place is not None and place.index is None
    if name != "auto":
        if on_cpu and BACKENDS[name].needs_gpu:
            raise InputError(f"{name} does not run on the CPU", "use --backend onnxruntime, or --device cuda")
        backend = load_backend(name, place)
        return Opened(name, backend, backend.open_session(bundle, FEATURES), "named")
    passed_over = []
    for candidate, entry in BACKENDS.items():
        if on_cpu and entry.needs_gpu:
            passed_over.append(f"{candidate} needs a GPU")
            continue
        backend = load_backend(candidate, place)
        if not backend.prepared(bundle):
            passed_over.append(f"no {candidate} engine in the bundle")
            continue
        try:
            session = backend.open_session(bundle, FEATURES)
        except (BundleError, MissingComponent) as error:  # too little memory ends the search
            passed_over.append(f"not {candidate}: {error.problem}")
            last = error
            continue
        return Opened(candidate, backend, session, "; ".join(["auto", *passed_over]))
    if isinstance(last, BundleError):  # of ONNX Runtime, which runs the bundle's own graphs: they are damaged
        raise last
    raise MissingComponent(f"no backend opens here ({'; '.join(passed_over)})", last.fix)


def load_backend(name: str, device: Device | None = None) -> Backend:
    """The backend of a registry entry on a device; None is its own choice, see `open_features`.

    Its module is imported now, and the library that it drives when a session opens.
    """
    entry = BACKENDS[name]
    backend: Backend = getattr(importlib.import_module(entry.module), entry.class_name)(
        *entry.arguments, device=device
    )
    return backend
