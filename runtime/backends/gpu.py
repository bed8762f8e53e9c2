"""Finding the GPU of this machine through the driver alone, without the CUDA toolkit or a binding."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_NAME_LENGTH = 256


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: such as "NVIDIA Orin".
        target: its compute capability, such as "sm_87".
        driver: the newest CUDA version that the driver runs; 12060 is 12.6.
    """

    name: str
    target: str
    driver: int

    def __str__(self) -> str:
        return f"{self.name} {self.target}"


def find_gpu() -> Gpu | None:
    """The first GPU; None if no driver answers."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    if cuda.cuDeviceGetName(name, _NAME_LENGTH, device) != 0:
        return None
    numbers = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        numbers.append(value.value)
    driver = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(driver)) != 0:
        return None
    return Gpu(name.value.decode(), f"sm_{numbers[0]}{numbers[1]}", driver.value)


def version_text(version: int) -> str:
    """Write a CUDA version number as people do: 12060 becomes "12.6"."""
    return f"{version // 1000}.{version % 1000 // 10}"
