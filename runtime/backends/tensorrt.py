"""TensorRT: engines built on the GPU that runs them."""

from __future__ import annotations

from ditf.runtime.backends import Probe, Session, engine
from ditf.runtime.bundles.bundle import Bundle

_FLAVOUR = "tensorrt"


def probe() -> Probe:
    """See `ditf.runtime.backends.engine`."""
    return engine.probe(_FLAVOUR)


def prepared(bundle: Bundle) -> bool:
    """See `ditf.runtime.backends.engine`."""
    return engine.prepared(_FLAVOUR, bundle)


def ready(bundle: Bundle) -> None:
    """See `ditf.runtime.backends.engine`."""
    engine.ready(_FLAVOUR, bundle)


def open_session(bundle: Bundle, graph: str) -> Session:
    """See `ditf.runtime.backends.engine`."""
    return engine.open_session(_FLAVOUR, bundle, graph)
