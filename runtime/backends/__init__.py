"""The registry of backends: what can run a bundle's graphs, and how each one is opened.

A backend is one file and one entry of `BACKENDS`. The file holds a class with the four methods of `Backend`.
The file is imported when the backend is asked for, and the library that it drives when a session opens. The
two TensorRT backends share a file and differ in an argument.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import DitfError, InputError, MissingComponent


@dataclass(frozen=True)
class BackendEntry:
    """One backend of the registry.

    Attributes:
        name: the value of --backend that selects it.
        module: the module that holds its class.
        class_name: the class, which has the methods of `Backend`.
        arguments: what the class is made with.
        platform: what the Open Inference Protocol's model metadata call the format that it runs.
    """

    name: str
    module: str
    class_name: str
    arguments: tuple[str, ...]
    platform: str


_ENTRIES = (
    BackendEntry("tensorrt", "ditf.runtime.backends.engine", "EngineBackend", ("tensorrt",), "tensorrt_plan"),
    BackendEntry(
        "tensorrt-rtx", "ditf.runtime.backends.engine", "EngineBackend", ("tensorrt-rtx",), "tensorrt_plan"
    ),
    BackendEntry(
        "onnxruntime", "ditf.runtime.backends.onnxruntime", "OnnxRuntimeBackend", (), "onnxruntime_onnx"
    ),
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

    def ready(self, bundle: Bundle) -> None:
        """Raise a DitfError if this backend cannot run the bundle on this machine."""

    def open_session(self, bundle: Bundle, graph: str) -> Session:
        """Open features.onnx or match.onnx, or the engine that was built from it."""


def choose_backend(bundle: Bundle, name: str | Backend = "auto") -> tuple[str, Backend, str]:
    """Pick the backend that runs a bundle.

    Args:
        name: "auto", a name of `BACKENDS`, or a backend object outside the registry, which is used as it is.

    Returns:
        The backend's name, the backend, and the reason for the choice.

    Raises:
        InputError: the name is unknown.
        MissingComponent: the named backend is not available here, or, with "auto", none is.
        BundleError: the bundle has no engine that the named backend can run.
    """
    if not isinstance(name, str):
        return type(name).__name__, name, "given"
    if name != "auto":
        if name not in BACKENDS:
            raise InputError(f"unknown backend {name!r}", f"choose auto or {', '.join(BACKENDS)}")
        backend = load_backend(name)
        backend.ready(bundle)
        return name, backend, "named"
    passed_over = []
    for candidate in BACKENDS:
        backend = load_backend(candidate)
        if not backend.prepared(bundle):
            passed_over.append(f"no {candidate} engine in the bundle")
            continue
        try:
            backend.ready(bundle)
        except DitfError as error:
            passed_over.append(f"not {candidate}: {error.problem}")
            last = error
            continue
        return candidate, backend, "; ".join(["auto", *passed_over])
    raise MissingComponent(f"no backend opens here ({'; '.join(passed_over)})", last.fix)


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend of a registry entry. Its module is imported now, the library it drives when it opens."""
    entry = BACKENDS[name]
    backend: Backend = getattr(importlib.import_module(entry.module), entry.class_name)(*entry.arguments)
    return backend
