"""The seam between the runtime and what runs a graph: one file a backend, imported when opened.

A backend module has two functions and one class:
    probe() -> Probe                        whether it can open here, without opening it
    open_session(path) -> Session           open one graph
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from ditf.runtime.errors import InputError, MissingComponent

BACKENDS = {"onnxruntime": "ditf.runtime.backends.onnxruntime"}
"""Backends by name, in the order in which `auto` prefers them."""

PLANNED = ("tensorrt", "tensorrt-rtx")
"""Names the contract reserves for backends this version does not have."""


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
        inputs: {name: shape} in the graph's order; None for a dynamic dimension.
        outputs: names, in the graph's order.
        detail: what runs it, for people: version and execution provider.
    """

    inputs: dict[str, tuple[int | None, ...]]
    outputs: tuple[str, ...]
    detail: str

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph. Safe to call from several threads."""

    def close(self) -> None:
        """Free what the session holds. Running it afterwards is an error."""


class Backend(Protocol):
    """The module of a backend."""

    def probe(self) -> Probe: ...

    def open_session(self, path: Path) -> Session: ...


def choose(name: str = "auto") -> tuple[str, Backend, str]:
    """Pick a backend.

    Args:
        name: "auto" or one of `BACKENDS`.

    Returns:
        Its name, its module, and why it was picked.

    Raises:
        InputError: unknown name.
        MissingComponent: the named backend, or every backend, is unavailable here.
    """
    if name != "auto":
        return _named(name)
    probes: list[tuple[str, Probe]] = []
    for candidate in BACKENDS:
        module = load_backend(candidate)
        probe = module.probe()
        if probe.available:
            passed_over = "".join(f"; not {other}: {why.detail}" for other, why in probes)
            return candidate, module, f"first available of {', '.join(BACKENDS)}{passed_over}"
        probes.append((candidate, probe))
    detail = "; ".join(f"{other}: {why.detail}" for other, why in probes)
    raise MissingComponent(f"no backend opens here ({detail})", probes[-1][1].fix)


def load_backend(name: str) -> Backend:
    """The module of a backend, imported now."""
    backend: Backend = cast(Backend, importlib.import_module(BACKENDS[name]))
    return backend


def _named(name: str) -> tuple[str, Backend, str]:
    if name in PLANNED:
        raise MissingComponent(
            f"{name} engines are built by this version of ditf, but not run: that needs an NVIDIA driver"
            " and a backend that is to come",
            "use --backend onnxruntime",
        )
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}", f"choose auto or {', '.join(BACKENDS)}")
    module = load_backend(name)
    probe = module.probe()
    if not probe.available:
        raise MissingComponent(f"backend {name} does not open here: {probe.detail}", probe.fix)
    return name, module, "named"
