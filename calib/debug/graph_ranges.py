"""`ditf check --ranges`: measure how large every 16-bit value of features.onnx gets on the golden images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.calib.debug.widened_graph import LARGEST_FINITE, WidenedGraph, maxima
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.golden_file import Golden
from ditf.runtime.features_runner import FeaturesRunner

HEADROOM_LIMIT = 1.0
"""Least headroom; below it a value overflows its type."""


@dataclass(frozen=True)
class GraphRange:
    """The largest |x| of a value of features.onnx.

    Attributes:
        name: the module and the operator that compute the value.
        dtype: "float16" or "bfloat16".
    """

    name: str
    dtype: str
    max_abs: float

    @property
    def headroom(self) -> float:
        """The type's largest number over the value; 0 if the value is not finite."""
        if not math.isfinite(self.max_abs):
            return 0.0
        return LARGEST_FINITE[self.dtype] / max(self.max_abs, 1e-30)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "max_abs": self.max_abs, "headroom": self.headroom}


@dataclass(frozen=True)
class WidenedRun:
    """What a 16-bit graph gives in float32 arithmetic on the golden images.

    Attributes:
        ranges: of every 16-bit value over all images and conditions, least headroom first.
        features: float32 [C, h, w] of the first image under the first condition.
    """

    ranges: list[GraphRange]
    features: np.ndarray


def run_widened(bundle: Bundle, widened: WidenedGraph, golden: Golden) -> WidenedRun:
    """Run a graph in float32 arithmetic on all golden images under all golden conditions.

    Args:
        widened: features.onnx widened but not rounded, so that no value saturates.
    """
    session = widened.with_maxima().open()
    runner = FeaturesRunner(bundle, session)
    checked = bundle.manifest.golden.get("conditions", [0])
    largest = dict.fromkeys(widened.short, 0.0)
    first: np.ndarray | None = None
    for index in checked:
        feeds = runner.feeds(prompt=runner.conditions[index] if len(runner.conditions) > 1 else None)
        for chunk, _ in runner.batches(golden["images"]):
            outputs = session.run({"image": chunk, **feeds})
            if first is None:
                first = outputs["features"][0]
            for name, value in maxima(outputs).items():
                largest[name] = max(largest[name], value if math.isfinite(value) else math.inf)
    found = [GraphRange(name, widened.short[name], value) for name, value in largest.items()]
    assert first is not None
    return WidenedRun(sorted(found, key=lambda one: one.headroom), first)
