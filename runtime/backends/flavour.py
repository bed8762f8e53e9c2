"""The two flavours of TensorRT: full TensorRT, and TensorRT-RTX, which has the same API in another module.

Whether a version has a feature is looked up by name (`has`) and never concluded from a version number.
"""

from __future__ import annotations

import functools
import importlib
import logging
import weakref
from dataclasses import dataclass
from typing import Any

from ditf.runtime.backends.gpu import Gpu, find_gpus
from ditf.runtime.errors import InputError, MissingComponent

logger = logging.getLogger(__name__)

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""Compute capabilities that TensorRT-RTX builds for ahead of time."""

PORTABLE = "portable"
"""The target of an engine for all of `TARGETS` but sm_75, which is compiled to the end where it runs."""

RTX = "tensorrt-rtx"


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    Attributes:
        name: the value of --backend.
        module: the Python module that is imported.
        install: the line that installs it.
        ahead: whether it builds engines for GPUs that are not in this machine.
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
    """Import the module of a flavour.

    Raises:
        InputError: no flavour has this name.
        MissingComponent: the module is not installed, or its libraries do not load.
    """
    flavour = FLAVOURS.get(name)
    if flavour is None:
        raise InputError(f"{name!r} builds no engines", f"choose {' or '.join(FLAVOURS)}")
    try:
        module = importlib.import_module(flavour.module)
    except ModuleNotFoundError:
        raise MissingComponent(f"{flavour.module} is not installed", flavour.install) from None
    except (ImportError, OSError) as error:  # the binding is installed, libnvinfer is not
        raise MissingComponent(
            f"{flavour.module} is half installed ({str(error)[:120]})", flavour.install
        ) from error
    if not hasattr(module, "Builder"):  # a stub from the package index
        raise MissingComponent(f"{flavour.module} is half installed (it has no Builder)", flavour.install)
    return module


def choose_flavour(name: str) -> tuple[Flavour, Any]:
    """Pick a flavour and import its module; "auto" picks the first whose module loads.

    Raises:
        InputError, MissingComponent: as `load_flavour`; with "auto", MissingComponent if none loads.
    """
    if name != "auto":
        return FLAVOURS.get(name, next(iter(FLAVOURS.values()))), load_flavour(name)
    reasons = []
    for flavour in FLAVOURS.values():
        try:
            return flavour, load_flavour(flavour.name)
        except MissingComponent as error:
            reasons.append(error.problem)
    gpus = find_gpus()
    helps = RTX if not gpus or any(map(has_rtx, gpus)) else "tensorrt"
    raise MissingComponent(f"nothing here builds engines ({'; '.join(reasons)})", FLAVOURS[helps].install)


def has_rtx(gpu: Gpu) -> bool:
    """Whether TensorRT-RTX runs on a GPU.

    It runs on the GPUs that it has targets for, by NVIDIA's documentation of version 1.7. Between them lie
    Jetson's Orin (sm_87) and Thor (sm_110), and data-centre GPUs such as the H100 (sm_90), for which it has
    none. GPUs newer than the last target are left to TensorRT-RTX to judge.
    """
    return gpu.target in TARGETS or gpu.capability > int(TARGETS[-1].removeprefix("sm_"))


class Log:
    """What TensorRT says while this object is alive.

    TensorRT keeps the first logger that it is given and ignores all others. So there is one for the process,
    and every `Log` hears all of its messages. Those from INFO on go to Python's logging, where --verbose
    shows them.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        details: keep every message, those of severity VERBOSE too.

    Attributes:
        logger: what TensorRT's classes are given.
        last: the last error, in one line.
        messages: all messages, if `details` was asked for.
    """

    def __init__(self, trt: Any, details: bool = False) -> None:
        self.last = "no message"
        self.messages: list[str] = []
        self._details = details
        self.logger, listeners = _process_logger(trt)
        listeners.add(self)

    def hear(self, error: bool, message: str) -> None:
        """Take a message of the process's logger."""
        if error:
            self.last = " ".join(message.split())[:300]
        if self._details:
            self.messages.append(message)


@functools.cache
def _process_logger(trt: Any) -> tuple[Any, weakref.WeakSet[Log]]:
    """The one logger of a library, and who hears it."""
    listeners: weakref.WeakSet[Log] = weakref.WeakSet()
    severities = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= severities.INFO:
                logger.info("%s: %s", severity.name, message)
            for log in list(listeners):
                log.hear(severity <= severities.ERROR, message)

    return Logger(), listeners


def has(module: Any, name: str) -> bool:
    """Whether a dotted name such as "BuilderFlag.STRIP_PLAN" exists in this version."""
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True
