"""The GPUs of this machine as the driver describes them, without the CUDA toolkit or a binding."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_NAME_LENGTH = 256
_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76  # of CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: such as "NVIDIA Orin".
        target: its compute capability, such as "sm_87".
        driver: the newest CUDA version that the driver runs; 12060 is 12.6.
        multiprocessors: how many streaming multiprocessors it has. Jetson modules of one generation have
            the same name and compute capability and differ in this.
        integrated: whether it shares the CPU's memory, as on a Jetson.
    """

    name: str
    target: str
    driver: int
    multiprocessors: int
    integrated: bool = False

    @property
    def capability(self) -> int:
        """Its compute capability as a number, such as 87."""
        return int(self.target.removeprefix("sm_"))

    def __str__(self) -> str:
        """What identifies it in engine.json, in the names of engines and in those of cache files."""
        return f"{self.name} {self.target} {self.multiprocessors} SMs"


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs in CUDA's order, as CUDA_VISIBLE_DEVICES leaves it; () if no driver answers."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    if cuda.cuInit(0) != 0:
        return ()
    count = _number(cuda.cuDeviceGetCount) or 0
    gpus: list[Gpu] = []
    for index in range(count):
        gpu = _describe(cuda, index)
        if gpu is None:  # what follows would get a wrong number
            break
        gpus.append(gpu)
    return tuple(gpus)


def find_gpu(index: int = 0) -> Gpu | None:
    """One of `find_gpus` by its number; None if there is no such GPU, or if no driver answers."""
    gpus = find_gpus()
    return gpus[index] if index < len(gpus) else None


def version_text(version: int) -> str:
    """Write a CUDA version number as people do: 12060 becomes "12.6"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _describe(cuda: Any, index: int) -> Gpu | None:
    device = _number(cuda.cuDeviceGet, index)
    driver = _number(cuda.cuDriverGetVersion)
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    if device is None or driver is None or cuda.cuDeviceGetName(name, _NAME_LENGTH, device) != 0:
        return None
    found = [
        _number(cuda.cuDeviceGetAttribute, attribute, device)
        for attribute in (_MAJOR, _MINOR, _MULTIPROCESSORS, _INTEGRATED)
    ]
    if None in found:
        return None
    major, minor, multiprocessors, integrated = found
    return Gpu(name.value.decode(), f"sm_{major}{minor}", driver, multiprocessors or 0, bool(integrated))


def _number(function: Callable[..., int], *arguments: int) -> int | None:
    """The int that a function of the driver writes to its first argument; None if it fails."""
    value = ctypes.c_int()
    return value.value if function(ctypes.byref(value), *arguments) == 0 else None
