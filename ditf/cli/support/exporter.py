"""Importing the exporter, which needs torch, diffusers and onnx."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from ditf.cli.support.state import state
from ditf.runtime.errors import missing_extra


@contextmanager
def needs_exporter() -> Iterator[None]:
    """Import the exporter in this block: its libraries say nothing unless --verbose is given.

    Raises:
        MissingComponent: a package is not installed; the error says how to install it.
    """
    try:
        from ditf.export.checkpoints.loading import quieten_libraries

        if not state.verbose:
            quieten_libraries()  # before the exporter imports what warns
        yield
        if not gc.get_freeze_count():  # once a process
            gc.freeze()  # modules stay: every collection of an export would visit their 600,000 objects
    except ImportError as error:
        package = (error.name or "a package of the exporter").partition(".")[0]
        raise missing_extra(package, "export") from error
