"""How long each part of a bundle's work takes here, and whether that is slower than it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)
_WIDEST = 2.0  # interval that still says something, upper over lower end
_FEWEST, _MOST = 3, 500  # calls of a repetition
_SHORTEST, _LONGEST = 1e-9, 1e6  # seconds that can have been measured
_RESAMPLES = 1000
_SEED = 0

Call = Callable[[int], object]
"""Does the work once; the argument picks the input."""


@dataclass(frozen=True)
class Row:
    """Timings of one part.

    Attributes:
        name: of the part; clock: what measured it.
        samples: seconds of every call, a list for each repetition, all of one length.
    """

    name: str
    clock: str
    samples: list[list[float]]

    @property
    def medians(self) -> np.ndarray:
        """Of each repetition, seconds."""
        medians: np.ndarray = np.median(np.array(self.samples), axis=1)
        return medians

    def statistics(self) -> dict[str, float]:
        """Percentiles, mean and extremes of all calls in seconds; throughput in calls a second."""
        every = np.ravel(self.samples)
        found = {f"p{p}": float(np.percentile(every, p)) for p in PERCENTILES}
        mean = float(every.mean())
        found |= {"mean": mean, "min": float(every.min()), "max": float(every.max())}
        return {**found, "throughput": 1.0 / mean if mean else 0.0, "calls": len(every)}

    def to_json(self) -> dict[str, Any]:
        return {"clock": self.clock, **self.statistics(), "samples": self.samples}

    @classmethod
    def from_json(cls, name: str, document: Mapping[str, Any]) -> Row:
        """Raises: KeyError, TypeError, ValueError where it is no row."""
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
) -> list[Row]:
    """Time parts in turns: a repetition calls each of them a number of times, inputs rotating.

    What disturbs the machine for a while then disturbs every part, and one repetition among several.

    Args:
        seconds: for each part, in all; every repetition has at least three calls, and one to warm up.
        clocks: {part: seconds of its last call by the device's own clock}, which become rows of their own.
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
        rows.append(Row(name, "host clock (perf_counter)", one))
        if name in by_device:
            rows.append(Row(f"{name}, GPU", "CUDA events", by_device[name]))
    return rows


@dataclass(frozen=True)
class Change:
    """A row against the same row of another run.

    Attributes:
        ratio: new median over old; low, high: its 95 % bootstrap interval.
    """

    name: str
    ratio: float
    low: float
    high: float

    def regressed(self, limit: float) -> bool:
        """Slower by more than `limit` (0.1 is 10 %), and not by chance: the interval lies above 1."""
        return self.ratio > 1 + limit and self.low > 1

    @property
    def decided(self) -> bool:
        """The interval is narrow enough to say anything."""
        return self.high < _WIDEST * self.low

    def gate(self, limit: float) -> dict[str, Any]:
        """As --json has it."""
        return {
            "name": f"{self.name} p50 ratio",
            "value": self.ratio,
            "limit": 1 + limit,
            "ok": not self.regressed(limit),
            "interval": [self.low, self.high],
        }


def compare(new: Row, old: Row) -> Change:
    """Ratio of medians, with an interval from resampling repetitions, then calls within them."""
    rng = np.random.default_rng(_SEED)
    low, high = np.percentile(_resampled(new, rng) / _resampled(old, rng), [2.5, 97.5])
    return Change(new.name, _median(new) / _median(old), float(low), float(high))


def _median(row: Row) -> float:
    """Of the repetitions' medians: one disturbed repetition does not move it."""
    return float(np.median(row.medians))


def _resampled(row: Row, rng: np.random.Generator) -> np.ndarray:
    """`_median` of resampled repetitions with resampled calls, [_RESAMPLES]."""
    samples = np.array(row.samples)
    repetitions, calls = samples.shape
    chosen = rng.integers(0, repetitions, (_RESAMPLES, repetitions, 1))
    drawn = rng.integers(0, calls, (_RESAMPLES, repetitions, calls))
    medians: np.ndarray = np.median(np.median(samples[chosen, drawn], axis=2), axis=1)
    return medians
