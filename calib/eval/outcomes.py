"""Results of every benchmark in one form: sums and weights of units that can be resampled.

A metric is the sum over the units divided by their weight. PCK per point is correct points over points, PCK
per image is the sum of the pairs' shares over pairs, and J&F is the sum of the objects' means over objects.
The same code therefore makes all tables, categories and intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Key = tuple[str, str]
"""A metric and its threshold, such as ("pck", "0.1"); the threshold is "" if the metric has none."""

Metrics = dict[str, dict[str, float]]
"""{metric: {threshold: value}}."""

_ROUNDS = 2000
_CHUNK = 1 << 22  # resampling counts held at a time


@dataclass(frozen=True)
class Outcome:
    """The result of one unit, a pair or a video.

    Attributes:
        name, category, group: those of the item.
        shares: {metric: (sum, weight)}.
        points: {metric: value of each of the unit's points}, if they are few enough to be kept.
        found: the estimate, for pictures: matches [K, 2], a homography or labels.
    """

    name: str
    category: str
    group: str
    shares: Mapping[Key, tuple[float, float]]
    points: Mapping[Key, np.ndarray] = field(default_factory=dict)
    found: Any = None

    def value(self, key: Key) -> float:
        """The metric of this unit alone."""
        total, weight = self.shares[key]
        return total / weight


def totals(outcomes: Sequence[Outcome]) -> Metrics:
    """The value of every metric over all units."""
    result: Metrics = {}
    for metric, threshold in outcomes[0].shares:
        sums = [outcome.shares[metric, threshold] for outcome in outcomes]
        value = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
        result.setdefault(metric, {})[threshold] = float(value)
    return result


def by_category(outcomes: Sequence[Outcome]) -> dict[str, Metrics]:
    """`totals` of each category, in order of first appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.category, []).append(outcome)
    return {name: totals(group) for name, group in groups.items()}


def category_mean(outcomes: Sequence[Outcome]) -> Metrics:
    """The mean of every metric over the categories, which count the same."""
    categories = list(by_category(outcomes).values())
    return {
        metric: {
            threshold: float(np.mean([category[metric][threshold] for category in categories]))
            for threshold in values
        }
        for metric, values in categories[0].items()
    }


def by_keypoint(outcomes: Sequence[Outcome], names: Sequence[Sequence[str]], key: Key) -> dict[str, float]:
    """A metric of each keypoint by name; `names` holds the names of each unit's points."""
    values: dict[str, list[float]] = {}
    for outcome, keypoints in zip(outcomes, names, strict=True):
        for name, value in zip(keypoints, outcome.points[key], strict=True):
            values.setdefault(name, []).append(float(value))
    return {name: float(np.mean(found)) for name, found in values.items()}


@dataclass(frozen=True)
class Difference:
    """A metric of one model minus that of another on the same units.

    Attributes:
        value: the difference; low, high: its 95 % bootstrap interval.
        units: how many were resampled, and what they are.
    """

    value: float
    low: float
    high: float
    units: str

    @property
    def certain(self) -> bool:
        """The interval does not hold zero."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "units": self.units}


def difference(
    ones: Sequence[Outcome], others: Sequence[Outcome], key: Key, unit: str = "pairs", seed: int = 0
) -> Difference:
    """The paired difference of a metric, ones - others, with a percentile bootstrap interval of 95 %.

    Whole units are drawn with replacement, the same for both sides, because points of a pair are not
    independent. If a benchmark has a single pair, its points are drawn, and the interval says nothing about
    other images.

    Args:
        ones, others: outcomes of the same items in the same order.
        unit: name of the items, for people.
        seed: seed of the resampling.
    """
    if [one.name for one in ones] != [other.name for other in others]:
        raise ValueError("outcomes of different items cannot be compared")
    sides, units = [], f"{len(ones)} {unit}"
    for outcomes in (ones, others):
        if len(outcomes) == 1 and key in outcomes[0].points:
            values = np.asarray(outcomes[0].points[key], np.float64)
            sides.append(np.stack([values, np.ones_like(values)], axis=1))
            units = f"{len(values)} points of one pair"
        else:
            sides.append(np.array([outcome.shares[key] for outcome in outcomes], np.float64))
    resampled = _resampled(sides, seed)
    (value,) = _values(sides[0].sum(0)[None]) - _values(sides[1].sum(0)[None])
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(float(value), float(low), float(high), units)


def _resampled(sides: list[np.ndarray], seed: int) -> np.ndarray:
    """Differences of the sides' ratios in every round, float64 [_ROUNDS]."""
    rng = np.random.default_rng(seed)
    count = len(sides[0])
    step = max(1, min(_ROUNDS, _CHUNK // count))
    found = []
    for start in range(0, _ROUNDS, step):
        rounds = min(step, _ROUNDS - start)
        counts = rng.multinomial(count, np.full(count, 1 / count), size=rounds)
        found.append(_values(counts @ sides[0]) - _values(counts @ sides[1]))
    return np.concatenate(found)


def _values(sums: np.ndarray) -> np.ndarray:
    """Sum over weight, for [n, 2]."""
    values: np.ndarray = sums[:, 0] / sums[:, 1]
    return values
