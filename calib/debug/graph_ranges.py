"""`ditf check --ranges`: how large every 16-bit value of the final graph gets on the golden images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ditf.calib.debug.onnx_twin import LARGEST, Twin
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.golden_file import Golden
from ditf.runtime.features_runner import FeaturesRunner

HEADROOM_LIMIT = 1.0
"""Least headroom: below it a value is infinite in its type."""


@dataclass(frozen=True)
class GraphRange:
    """The largest |x| of a value of features.onnx.

    Attributes:
        name: the module that computes it, and the operator; dtype: "float16" or "bfloat16".
    """

    name: str
    dtype: str
    max_abs: float

    @property
    def headroom(self) -> float:
        """Times that its type's largest number is larger; 0 where the value is not finite."""
        if not math.isfinite(self.max_abs):
            return 0.0
        return LARGEST[self.dtype] / max(self.max_abs, 1e-30)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "max_abs": self.max_abs, "headroom": self.headroom}


def graph_ranges(bundle: Bundle, twin: Twin, golden: Golden) -> list[GraphRange]:
    """Every 16-bit value over the golden images under every golden condition, the largest first.

    Args:
        twin: of features.onnx, not rounded: float32 has no limit to hide behind.
    """
    if not twin.short:
        return []
    session = twin.with_maxima().open()
    runner = FeaturesRunner(bundle, session)
    checked = bundle.manifest.golden.get("conditions", [0])
    largest = dict.fromkeys(twin.short, 0.0)
    for index in checked:
        feeds = runner.feeds(prompt=runner.conditions[index] if len(runner.conditions) > 1 else None)
        for chunk, _ in runner.batches(golden["images"]):
            for name, value in session.maxima({"image": chunk, **feeds}).items():
                largest[name] = max(largest[name], value if math.isfinite(value) else math.inf)
    found = [GraphRange(name, twin.short[name], value) for name, value in largest.items()]
    return sorted(found, key=lambda one: one.headroom)
