"""The seam between the runtime and what runs a graph: one file a backend, imported when opened.

A backend module has four functions:
    probe() -> Probe                        whether it opens here, without opening it
    prepared(bundle) -> bool                whether a bundle has what it runs; imports nothing
    ready(bundle)                           raises if the bundle cannot run here
    open_session(bundle, graph) -> Session  open features.onnx or match.onnx, or what was built of it
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import DitfError, InputError, MissingComponent

BACKENDS = {
    "tensorrt": "ditf.runtime.backends.tensorrt",
    "tensorrt-rtx": "ditf.runtime.backends.tensorrt_rtx",
    "onnxruntime": "ditf.runtime.backends.onnxruntime",
}
"""Backends by name, in the order in which `auto` prefers them."""


@dataclass(frozen=True)
class Probe:
    """What a backend finds of itself on this machine.

    Attributes:
        available: it can open sessions.
        detail: version and devices, or why it cannot open.
        fix: the line that installs what is missing; empty when available.
    """

    available: bool
    detail: str
    fix: str = ""


class Session(Protocol):
    """One opened graph.

    Attributes:
        inputs, outputs: {name: shape} in the graph's order; None for a dynamic dimension.
        detail: what runs it, for people: version and device.
        batches: (smallest, largest) number of images, one for each profile; () where
            any size does that `inputs` allows.
        device_seconds: of the last run by the device's own clock; None where it has none.
        device_bytes: of the device's memory that it holds; None where it does not know.
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
            feeds: arrays in host memory, or as an earlier run kept them.
            keep: outputs that may stay in the device's memory: they have `shape`, `dtype` and `numpy()`.
        """

    def close(self) -> None:
        """Free what the session holds. Running it afterwards is an error."""


class Backend(Protocol):
    """The module of a backend."""

    def probe(self) -> Probe: ...

    def prepared(self, bundle: Bundle) -> bool: ...

    def ready(self, bundle: Bundle) -> None: ...

    def open_session(self, bundle: Bundle, graph: str) -> Session: ...


def choose(bundle: Bundle, name: str | Backend = "auto") -> tuple[str, Backend, str]:
    """Pick what runs a bundle.

    Args:
        name: "auto" or one of `BACKENDS`; or a backend that is none of them, which is taken.

    Returns:
        Its name, its module, and why it was picked.

    Raises:
        InputError: unknown name.
        MissingComponent: the named backend, or every backend, is unavailable here.
        BundleError: the bundle has no engine that the named backend can run.
    """
    if not isinstance(name, str):
        return type(name).__name__, name, "given"
    if name != "auto":
        if name not in BACKENDS:
            raise InputError(f"unknown backend {name!r}", f"choose auto or {', '.join(BACKENDS)}")
        module = load_backend(name)
        module.ready(bundle)
        return name, module, "named"
    passed_over = []
    for candidate in BACKENDS:
        module = load_backend(candidate)
        if not module.prepared(bundle):
            passed_over.append(f"no {candidate} engine in the bundle")
            continue
        try:
            module.ready(bundle)
        except DitfError as error:
            passed_over.append(f"not {candidate}: {error.problem}")
            last = error
            continue
        return candidate, module, "; ".join(["auto", *passed_over])
    raise MissingComponent(f"no backend opens here ({'; '.join(passed_over)})", last.fix)


def load_backend(name: str) -> Backend:
    """The module of a backend, imported now; what it drives is imported when it opens."""
    backend: Backend = cast(Backend, importlib.import_module(BACKENDS[name]))
    return backend
