"""The driver's library, libcuda, as ctypes sees it: what `find_gpu` asks before any binding is imported."""

from __future__ import annotations

from typing import Any

from tests.standin.world import World

_INVALID_DEVICE = 101


class Driver:
    """The functions of libcuda that name a device. Arguments are what ctypes would pass."""

    def __init__(self, world: World) -> None:
        self._world = world

    def cuInit(self, flags: int) -> int:
        return 0 if self._world.models else 100

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._world.driver
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self._world.models)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        if not 0 <= _number(ordinal) < len(self._world.models):
            return _INVALID_DEVICE
        device._obj.value = _number(ordinal)
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        text = self._world.models[_number(device)].name.encode()
        name.value = text[: _number(length) - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        model = self._world.models[_number(device)]
        values = {16: model.multiprocessors, 18: int(model.integrated), 75: model.capability[0],
                  76: model.capability[1]}  # fmt: skip
        if _number(attribute) not in values:
            return 1
        value._obj.value = values[_number(attribute)]
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:
        total._obj.value = self._world.models[_number(device)].total_bytes
        return 0


def _number(value: Any) -> int:
    return int(getattr(value, "value", value))
