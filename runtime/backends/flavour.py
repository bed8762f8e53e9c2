"""The TensorRT that is installed: full TensorRT, or TensorRT-RTX, the same API from another module.

What a version may lack is asked for by name (`has`), never concluded from a version number.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ditf.runtime.errors import InputError, MissingComponent

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""Compute capabilities that TensorRT-RTX builds for ahead of time."""

PORTABLE = "portable"
"""An engine for any of them, which the GPU's own compiler finishes."""


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    Attributes:
        name: as --backend has it; module: what is imported; install: the line that installs it.
        ahead: it builds for GPUs that are not there.
    """

    name: str
    module: str
    install: str
    ahead: bool


FLAVOURS = {
    "tensorrt": Flavour(
        "tensorrt",
        "tensorrt",
        "on Jetson it comes with JetPack (apt install tensorrt, and a virtual environment with"
        " --system-site-packages); elsewhere run: pip install tensorrt",
        ahead=False,
    ),
    "tensorrt-rtx": Flavour(
        "tensorrt-rtx", "tensorrt_rtx", "run: pip install 'ditf[tensorrt-rtx]'", ahead=True
    ),
}
"""In the order in which `auto` prefers them."""


def load_flavour(name: str) -> Any:
    """The module of a flavour.

    Raises:
        InputError: unknown name.
        MissingComponent: not installed, or half: its libraries do not load.
    """
    flavour = FLAVOURS.get(name)
    if flavour is None:
        raise InputError(f"{name!r} builds no engines", f"choose {' or '.join(FLAVOURS)}")
    try:
        module = importlib.import_module(flavour.module)
    except ModuleNotFoundError:
        raise MissingComponent(f"{flavour.module} is not installed", flavour.install) from None
    except (ImportError, OSError) as error:  # the binding is there, libnvinfer is not
        raise MissingComponent(
            f"{flavour.module} is half installed ({str(error)[:120]})", flavour.install
        ) from error
    if not hasattr(module, "Builder"):  # a stub of the package index
        raise MissingComponent(f"{flavour.module} is half installed (it has no Builder)", flavour.install)
    return module


def choose_flavour(name: str) -> tuple[Flavour, Any]:
    """A flavour and its module; "auto" takes the first that loads.

    Raises:
        InputError, MissingComponent: see `load_flavour`; of "auto" where none loads.
    """
    if name != "auto":
        return FLAVOURS.get(name, next(iter(FLAVOURS.values()))), load_flavour(name)
    reasons = []
    for flavour in FLAVOURS.values():
        try:
            return flavour, load_flavour(flavour.name)
        except MissingComponent as error:
            reasons.append(error.problem)
    last = FLAVOURS["tensorrt-rtx"]
    raise MissingComponent(f"nothing here builds engines ({'; '.join(reasons)})", last.install)


class Log:
    """Keeps TensorRT's last error message instead of printing it."""

    def __init__(self, trt: Any) -> None:
        log = self
        self.last = "no message"

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    log.last = message.split("\n")[0][:300]

        self.logger = Logger()


def has(module: Any, name: str) -> bool:
    """Whether a dotted name such as "BuilderFlag.STRIP_PLAN" exists in this version."""
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True
