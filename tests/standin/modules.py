"""The modules `tensorrt_rtx` and `tensorrt` with the stand-in's runtime half."""

from __future__ import annotations

import importlib
import os
import types
from pathlib import Path
from typing import Any

from tests.standin.building import building_classes
from tests.standin.engine import Context, Engine, Runtime
from tests.standin.kernels import RuntimeCache, RuntimeConfig
from tests.standin.world import World

VERSION = "DITF_STANDIN_TENSORRT"
"""The environment variable with the version of full TensorRT that is stood in for."""

_RUNTIME_HALF = {
    "Runtime": Runtime,
    "ICudaEngine": Engine,
    "IExecutionContext": Context,
    "IRuntimeConfig": RuntimeConfig,
    "IRuntimeCache": RuntimeCache,
}
_AFTER_10_3 = {
    "IExecutionContext.set_device_memory", "OnnxParser.load_initializer",
    "OnnxParserRefitter.load_initializer",
    "ICudaEngine.device_memory_size_v2", "ICudaEngine.get_device_memory_size_for_profile_v2",
    "ICudaEngine.create_runtime_config", "IRuntimeConfig", "OnnxParser.load_model_proto",
    "OnnxParser.parse_model_proto",
}  # fmt: skip


class _Missing:
    """A name that this version lacks."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        raise AttributeError("this version has no such name")

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError("this version has no such name")


def rtx_module(world: World) -> types.ModuleType:
    """`tensorrt_rtx`: the real module, but for its runtime half and a builder that remembers."""
    real = _real_rtx()
    module = types.ModuleType("tensorrt_rtx", __doc__)
    for name in dir(real):
        if not name.startswith("__"):
            setattr(module, name, getattr(real, name))
    module.__dict__["__version__"] = real.__version__
    module.__dict__["__standin__"] = real
    names = {name: set(dir(getattr(real, name))) for name in _RUNTIME_HALF if hasattr(real, name)}
    _fill(module, world, real, names, "tensorrt_rtx")
    return module


def tensorrt_module(world: World, version: str | None = None) -> types.ModuleType:
    """`tensorrt` with exactly the names of one version, whose builder needs no GPU.

    Args:
        version: of tests/engines/api or "10.3.0"; None for that of the environment.
    """
    version = version or os.environ.get(VERSION) or "11.4.0.106"
    real = _real_rtx()
    names = api_names(version)
    module = types.ModuleType("tensorrt", __doc__)
    for name in names:
        if hasattr(real, name):
            value = getattr(real, name)
            if name == "IBuilderConfig":
                value = _restricted(value, names[name])
            elif hasattr(value, "__members__") and names[name]:
                value = types.SimpleNamespace(**{one: getattr(value, one, one) for one in names[name]})
            setattr(module, name, value)
    module.__dict__["DataType"] = real.DataType  # of the values that the lists do not name
    module.__dict__["__version__"] = version
    _fill(module, world, real, names, "tensorrt")
    return module


def api_names(version: str, listed_as: str = "") -> dict[str, set[str]]:
    """{class: its public names} of a version of full TensorRT, or of the list of another library."""
    listed = Path(__file__).parent.parent / "engines" / "api"
    like = "10.13.3.9" if version.startswith("10.3") else version
    found: dict[str, set[str]] = {}
    for line in (listed / f"{listed_as or f'tensorrt-{like}'}.txt").read_text().splitlines():
        if line.startswith("#") or (version.startswith("10.3") and _newer(line)):
            continue
        head, _, rest = line.partition(".")
        found.setdefault(head, set())
        if rest:
            found[head].add(rest)
    return found


def _newer(line: str) -> bool:
    return any(line == name or line.startswith(f"{name}.") for name in _AFTER_10_3)


def _fill(
    module: types.ModuleType, world: World, real: Any, names: dict[str, set[str]], flavour: str
) -> None:
    replaced = {**building_classes(world, real, module, flavour), **_RUNTIME_HALF}
    for name, cls in replaced.items():
        if name not in names and name in _RUNTIME_HALF:
            continue
        own = type(name, (cls,), {"__module__": module.__name__})
        if name in names:
            own = _restricted(own, names[name])
        if name == "Runtime":
            own.world, own.trt = world, module
        setattr(module, name, own)


def _restricted(value: Any, names: set[str]) -> Any:
    """A class without the public names that this version lacks."""
    public = {name for name in dir(value) if not name.startswith("_")}
    own = {"world", "trt", "digest", "built", "model", "device", "refitted", "session", "children",
           "kernels", "cache", "strategy", "graphs", "specialisation",
           "engine", "logger", "get_flag", "network"}  # fmt: skip
    missing = {name: _Missing() for name in public - names - own}
    return type(value.__name__, (value,), missing)


def _real_rtx() -> Any:
    real = importlib.import_module("tensorrt_rtx")
    return getattr(real, "__standin__", real)
