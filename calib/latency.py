"""Timing each part of a bundle's work, and comparing it with an earlier run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)
_WIDEST = 2.0  # upper over lower end of an interval that still decides something
_FEWEST, _MOST = 3, 500  # calls in a repetition
_SHORTEST, _LONGEST = 1e-9, 1e6  # seconds that a clock can have measured
_RESAMPLES = 1000
_SEED = 0

Call = Callable[[int], object]
"""Does the work once; the argument picks the input."""


@dataclass(frozen=True)
class Timing:
    """Timings of one part.

    Attributes:
        name: name of the part.
        clock: the clock that measured it.
        samples: seconds of every call, one list per repetition, all of the same length.
    """

    name: str
    clock: str
    samples: list[list[float]]

    @property
    def medians(self) -> np.ndarray:
        """Median of each repetition, seconds."""
        medians: np.ndarray = np.median(np.array(self.samples), axis=1)
        return medians

    def statistics(self) -> dict[str, float]:
        """Percentiles, mean and extremes of all calls in seconds; throughput in calls per second."""
        every = np.ravel(self.samples)
        found = {f"p{p}": float(np.percentile(every, p)) for p in PERCENTILES}
        mean = float(every.mean())
        found |= {"mean": mean, "min": float(every.min()), "max": float(every.max())}
        return {**found, "throughput": 1.0 / mean if mean else 0.0, "calls": len(every)}

    def to_json(self) -> dict[str, Any]:
        return {"clock": self.clock, **self.statistics(), "samples": self.samples}

    @classmethod
    def from_json(cls, name: str, document: Mapping[str, Any]) -> Timing:
        """Raises: KeyError, TypeError or ValueError if the document is not a row."""
        samples = [[float(value) for value in one] for one in document["samples"]]
        lengths = {len(one) for one in samples}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError("repetitions without timings, or of different lengths")
        if not all(_SHORTEST < value < _LONGEST for one in samples for value in one):
            raise ValueError("a timing that no clock shows")
        return cls(name, str(document["clock"]), samples)


def measure(
    parts: Mapping[str, Call],
    seconds: float,
    repetitions: int,
    step: Callable[[str], None] = lambda name: None,
    clocks: Mapping[str, Callable[[], float | None]] | None = None,
) -> list[Timing]:
    """Time parts in turns: each repetition calls every part several times with rotating inputs.

    A disturbance of the machine then affects all parts alike, and only some of the repetitions.

    Args:
        seconds: time for each part in all; a repetition has at least three calls and one to warm up.
        clocks: {part: function that returns the seconds of its last call by the device's own clock}; each
            becomes a row of its own.
    """
    counts: dict[str, int] = {}
    samples: dict[str, list[list[float]]] = {name: [] for name in parts}
    by_device: dict[str, list[list[float]]] = {}
    for repetition in range(repetitions):
        for name, call in parts.items():
            step(name)
            start = time.perf_counter()
            call(0)
            once = time.perf_counter() - start
            if name not in counts:
                counts[name] = int(np.clip(seconds / repetitions / max(once, 1e-9), _FEWEST, _MOST))
            taken, device = [], []
            for index in range(counts[name]):
                start = time.perf_counter()
                call(repetition * counts[name] + index)
                taken.append(time.perf_counter() - start)
                own = (clocks or {}).get(name, lambda: None)()
                if own is not None:
                    device.append(own)
            samples[name].append(taken)
            if device:
                by_device.setdefault(name, []).append(device)
    rows = []
    for name, one in samples.items():
        rows.append(Timing(name, "host clock (perf_counter)", one))
        if name in by_device:
            rows.append(Timing(f"{name}, GPU", "CUDA events", by_device[name]))
    return rows


@dataclass(frozen=True)
class Change:
    """A row compared with the same row of another run.

    Attributes:
        ratio: new median over old median.
        low, high: the 95 % bootstrap interval of the ratio.
    """

    name: str
    ratio: float
    low: float
    high: float

    def regressed(self, limit: float) -> bool:
        """Whether it is slower by more than `limit` (0.1 is 10 %) and the interval lies above 1."""
        return self.ratio > 1 + limit and self.low > 1

    @property
    def decided(self) -> bool:
        """Whether the interval is narrow enough to decide."""
        return self.high < _WIDEST * self.low

    def gate(self, limit: float) -> dict[str, Any]:
        """The gate as it stands in --json."""
        return {
            "name": f"{self.name} p50 ratio",
            "value": self.ratio,
            "limit": 1 + limit,
            "ok": not self.regressed(limit),
            "interval": [self.low, self.high],
        }


def compare(new: Timing, old: Timing) -> Change:
    """Compare medians; the interval comes from resampling repetitions, then calls within them."""
    rng = np.random.default_rng(_SEED)
    low, high = np.percentile(_resampled(new, rng) / _resampled(old, rng), [2.5, 97.5])
    return Change(new.name, _median(new) / _median(old), float(low), float(high))


def _median(row: Timing) -> float:
    """Median of the repetitions' medians, which one disturbed repetition does not move."""
    return float(np.median(row.medians))


def _resampled(row: Timing, rng: np.random.Generator) -> np.ndarray:
    """`_median` of resampled repetitions with resampled calls, float64 [_RESAMPLES]."""
    samples = np.array(row.samples)
    repetitions, calls = samples.shape
    chosen = rng.integers(0, repetitions, (_RESAMPLES, repetitions, 1))
    drawn = rng.integers(0, calls, (_RESAMPLES, repetitions, calls))
    medians: np.ndarray = np.median(np.median(samples[chosen, drawn], axis=2), axis=1)
    return medians
