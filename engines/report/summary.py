"""The report of an engine: its kernels by kind, the bytes they move, and the least time they can take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ditf.engines.report.kinds import (
    ATTENTION,
    CONVOLUTION,
    NO_KERNELS,
    PRODUCT,
    computes_in,
    kind_of,
    operations,
)
from ditf.engines.report.layer_log import CompiledLayer, EngineLayers
from ditf.runtime.errors import InputError

_RATED = ("float32", "float16", "bfloat16", "int8")  # types for which devices have a rate
_STAGES = {"encoder.": "VAE", "encoder/": "VAE", "condition.": "condition", "trunk.": "trunk"}
"""{start of an ONNX node's name: stage}, in the order in which they run."""


class Device(Protocol):
    """A device whose rates are known."""

    def seconds(self, kind: str, operations: float, moved: float) -> float:
        """The least seconds for this many operations of a type, and bytes moved."""


@dataclass(frozen=True)
class Report:
    """What the compiler made of a graph.

    Attributes:
        plan: the plan's file name.
        target: what it was compiled for.
        engine: its layers.
    """

    plan: str
    target: str
    engine: EngineLayers

    @property
    def kernels(self) -> dict[str, int]:
        """{kind: number of layers}; products, convolutions and attentions with the type of their factors."""
        return dict(sorted(Counter(_label(layer) for layer in self.engine.layers).items()))

    @property
    def kernel_count(self) -> int:
        """Number of layers that launch a kernel."""
        return sum(kind_of(layer) not in NO_KERNELS for layer in self.engine.layers)

    @property
    def bytes_moved(self) -> int:
        """Bytes that all layers read and write."""
        return sum(layer.read + layer.written for layer in self.engine.layers)

    @property
    def stages(self) -> dict[str, dict[str, int]]:
        """{stage: kernels and bytes}; a kernel of two stages counts for the earlier one."""
        found: dict[str, dict[str, int]] = {}
        for layer in self.engine.layers:
            row = found.setdefault(_stage(layer), {"kernels": 0, "bytes": 0})
            row["kernels"] += kind_of(layer) not in NO_KERNELS
            row["bytes"] += layer.read + layer.written
        return found

    def least_seconds(self, device: Device) -> float:
        """The sum over layers of the longer of two times: that of the operations, and that of the bytes."""
        return sum(
            device.seconds(_rate(layer), operations(layer), layer.read + layer.written)
            for layer in self.engine.layers
        )

    def least_ms(self, devices: Mapping[str, Device]) -> dict[str, float]:
        """{device: the least milliseconds}, without devices whose rates for this engine are not published."""
        found = {}
        for name, device in devices.items():
            with suppress(InputError):
                found[name] = self.least_seconds(device) * 1e3
        return found

    def to_json(self, devices: Mapping[str, Device]) -> dict[str, Any]:
        """The report as a document.

        Args:
            devices: those for which the least time is given.
        """
        return {
            "plan": self.plan,
            "target": self.target,
            "kernels": self.kernels,
            "stages": self.stages,
            "bytes": self.bytes_moved,
            "activation_bytes": self.engine.activation_bytes,
            "weight_bytes": self.engine.weight_bytes,
            "least_ms": self.least_ms(devices),
            "layers": [
                {
                    "name": layer.name,
                    "kind": _label(layer),
                    "read": layer.read,
                    "written": layer.written,
                    "operations": operations(layer),
                    "onnx": list(layer.sources),
                }
                for layer in self.engine.layers
            ],
        }


def _label(layer: CompiledLayer) -> str:
    kind = kind_of(layer)
    return f"{computes_in(layer)} {kind}" if kind in (ATTENTION, PRODUCT, CONVOLUTION) else kind


def _stage(layer: CompiledLayer) -> str:
    for prefix, stage in _STAGES.items():
        if any(source.startswith(prefix) for source in layer.sources):
            return stage
    return "other"


def _rate(layer: CompiledLayer) -> str:
    dtype = computes_in(layer)
    return dtype if dtype in _RATED else "float16"
