"""The GPU that is here, asked of the driver alone: no CUDA toolkit, no binding."""

from __future__ import annotations

import ctypes

_NAME_LENGTH = 256


def gpu_name() -> str | None:
    """Name and compute capability of the first GPU, "NVIDIA Orin sm_87"; None where no driver answers."""
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
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        capability.append(value.value)
    return f"{name.value.decode()} sm_{capability[0]}{capability[1]}"
