"""Comparing a bundle with its golden data, whatever runs its features graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ditf.calib.parity import WHOLE, feature_parity, match_parity, worst
from ditf.runtime import FeatureMap
from ditf.runtime.bundles.golden_file import Golden
from ditf.runtime.matching.points import Matches, match_points


class RunFeatures(Protocol):
    """A callable that computes features, such as `Model.run`."""

    def __call__(self, pixels: np.ndarray, *, prompt: str | None = None) -> np.ndarray:
        """uint8 [n, H, W, 3] -> [n, C, h, w]."""


@dataclass(frozen=True)
class GoldenResult:
    """Features and matches of the golden images, and their parity.

    Attributes:
        metrics: every parity metric; those of the features are the worst over the conditions in golden.npz.
            A bundle that approximates the model (--vae, --text-tokens) also has whole_* metrics, the cost of
            the approximation.
        maps: [2, C, h, w], under the first condition.
        matches: matches of the golden points; None if the features are not finite.
    """

    metrics: dict[str, float]
    maps: np.ndarray
    matches: Matches | None

    @property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """The source map and the target map."""
        return self.maps[0], self.maps[1]


def golden_result(golden: Golden, run: RunFeatures, conditions: Sequence[str]) -> GoldenResult:
    """RunFeatures the golden images under the golden conditions and compare.

    Args:
        conditions: names of the bundle's; () where it is baked in.
    """
    maps = run(golden["images"])
    rows = take_rows(maps, golden["rows"])
    measured = [feature_parity(rows, golden["features"])]
    for index, name in enumerate(conditions):
        if f"rows_{index}" in golden:
            one = run(golden["images"][:1], prompt=name)
            found = take_rows(one, golden[f"rows_{index}"][None])[0]
            measured.append(feature_parity(found, golden[f"features_{index}"]))
    metrics = worst(measured)
    if not np.isfinite(maps).all():
        return GoldenResult(metrics, maps, None)  # NaN metrics fail their gates
    size = image_size(golden)
    matches = match_points(FeatureMap(maps[0], size), FeatureMap(maps[1], size), golden["points"])
    cell = (size[0] / maps.shape[2], size[1] / maps.shape[3])
    metrics |= match_parity(matches.points, golden["match_points"], cell)
    if "whole_features" in golden:
        cost = feature_parity(rows, golden["whole_features"])
        cost |= match_parity(matches.points, golden["whole_match_points"], cell)
        metrics |= {f"{WHOLE}{name}": value for name, value in cost.items()}
    return GoldenResult(metrics, maps, matches)


def image_size(golden: Golden) -> tuple[int, int]:
    """(H, W) of the golden images."""
    height, width = golden["images"].shape[1:3]
    return height, width


def take_rows(maps: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Token rows [n, R, C] of maps [n, C, h, w] at indices [n, R]."""
    tokens = maps.reshape(len(maps), maps.shape[1], -1).transpose(0, 2, 1)
    return np.take_along_axis(tokens, rows[:, :, None], axis=1)
