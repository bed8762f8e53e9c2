"""Putting the stand-in in the place of the driver, `cuda.bindings.runtime`, `tensorrt_rtx` and `tensorrt`."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from typing import Any

from tests.standin.cuda_runtime import cuda_module
from tests.standin.driver import Driver
from tests.standin.modules import rtx_module, tensorrt_module
from tests.standin.world import DeviceModel, World

DEVICES = "DITF_STANDIN_DEVICES"
"""The environment variable with the devices as JSON: a list of the fields of `DeviceModel`."""

_LIBRARY = "libcuda.so.1"


def library_loader(world: World, real: Any) -> Any:
    """A `ctypes.CDLL` that gives the stand-in's driver for libcuda."""
    driver = Driver(world)

    def load(name: Any, *arguments: Any, **keywords: Any) -> Any:
        return driver if name == _LIBRARY else real(name, *arguments, **keywords)

    return load


def modules(world: World, full: str | None) -> dict[str, Any]:
    """The modules to be put into `sys.modules`.

    Args:
        full: the version of full TensorRT that is installed; None for none.
    """
    made: dict[str, Any] = {"cuda.bindings.runtime": cuda_module(world), "tensorrt_rtx": rtx_module(world)}
    if full is not None:
        made["tensorrt"] = tensorrt_module(world, full)
    return made


def install_in_process(world: World, full: str | None) -> None:
    """Install for the whole life of a process, before anything of ditf is imported."""
    ctypes.CDLL = library_loader(world, ctypes.CDLL)  # type: ignore[misc]
    for name, module in modules(world, full).items():
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(importlib.import_module(parent), child, module)


def world_of_environment() -> World:
    """The devices that the environment names; one of the usual kind if it names none."""
    text = os.environ.get(DEVICES)
    if not text:
        return World()
    models = [DeviceModel(**{**one, "capability": tuple(one["capability"])}) for one in json.loads(text)]
    return World(models)
