from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.latency import Change, Timing, compare, measure


def row(scale: float = 1.0, noise: float = 0.05, seed: int = 0, repetitions: int = 5) -> Timing:
    """Log-normal timings around 10 ms."""
    rng = np.random.default_rng(seed)
    samples = scale * 0.01 * np.exp(noise * rng.standard_normal((repetitions, 20)))
    return Timing("features", "host", samples.tolist())


def test_parts_take_turns_and_inputs_rotate():
    calls: list[tuple[str, int]] = []
    parts = {name: lambda index, name=name: calls.append((name, index)) for name in ("a", "b")}
    rows = measure(parts, seconds=0.0, repetitions=3)
    assert [one.name for one in rows] == ["a", "b"]
    assert [len(sample) for sample in rows[0].samples] == [3, 3, 3]  # the fewest
    assert calls[:8] == [("a", i) for i in (0, 0, 1, 2)] + [("b", i) for i in (0, 0, 1, 2)]
    assert [index for name, index in calls if name == "a"][4:] == [0, 3, 4, 5, 0, 6, 7, 8]


def test_a_clock_of_the_device_makes_a_row_of_its_own():
    rows = measure({"a": lambda index: None}, 0.0, 2, clocks={"a": lambda: 0.25})
    assert [one.name for one in rows] == ["a", "a, GPU"]
    assert rows[1].statistics()["p50"] == 0.25
    assert rows[1].clock == "CUDA events"


def test_time_is_what_the_clock_shows():
    (one,) = measure({"a": lambda index: time.sleep(0.002)}, 0.02, 2)
    assert one.statistics()["min"] >= 0.002


def test_statistics():
    found = Timing("a", "host", [[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]]).statistics()
    assert (found["p50"], found["min"], found["max"], found["calls"]) == (3.5, 1.0, 100.0, 6)
    assert found["throughput"] == pytest.approx(6 / 115)
    assert found["p90"] <= found["p95"] <= found["p99"] <= found["max"]


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.05, 1.3])
def test_only_what_is_slower_by_more_than_the_limit_regressed(scale):
    change = compare(row(scale, seed=1), row())
    assert change.ratio == pytest.approx(scale, rel=0.03)
    assert change.low <= change.ratio <= change.high
    assert change.regressed(0.1) == (scale == 1.3)


def test_noise_is_no_regression():
    """The median moved by more than the limit, but the repetitions do not agree that it did."""
    old = Timing("a", "host", [[1.0] * 9, [1.0] * 9, [1.0] * 9])
    new = Timing("a", "host", [[0.9] * 9, [1.2] * 9, [1.3] * 9])
    change = compare(new, old)
    assert change.ratio > 1.1
    assert not change.regressed(0.1)


def test_one_disturbed_repetition_is_outvoted():
    disturbed = row()
    disturbed.samples[2] = [value * 10 for value in disturbed.samples[2]]
    assert not compare(disturbed, row(seed=1)).regressed(0.1)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.2, 5.0), st.integers(0, 100))
def test_the_interval_holds_a_ratio_of_scales(scale, seed):
    old = row(seed=seed)
    change = compare(Timing("a", "host", [[v * scale for v in one] for one in old.samples]), old)
    assert change.ratio == pytest.approx(scale)
    assert change.low <= scale * (1 + 1e-9)
    assert change.high >= scale * (1 - 1e-9)


def test_an_interval_that_says_nothing_is_said_to():
    assert not Change("a", 5.4, 0.3, 45.0).decided
    assert Change("a", 1.1, 0.9, 1.3).decided


def test_the_gate():
    gate = Change("features", 1.2, 1.1, 1.3).gate(0.1)
    assert gate == {
        "name": "features p50 ratio",
        "value": 1.2,
        "limit": 1.1,
        "ok": False,
        "interval": [1.1, 1.3],
    }


def test_rows_survive_json():
    one = row()
    assert Timing.from_json("features", json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    "samples",
    [[], [[]], [[0.0]], [[1.0], [1.0, 2.0]], [[1e999]], [[1e-320]], [["x"]], [[float("nan")]], 3, None],
)
def test_samples_that_are_none(samples):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Timing.from_json("a", {"clock": "host", "samples": samples})
