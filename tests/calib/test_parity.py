from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.parity import (
    CEILINGS,
    DISPLACEMENT,
    FLOORS,
    MEASURED_MARGIN,
    ONNXRUNTIME_CPU,
    TOLERANCES,
    Gate,
    feature_parity,
    gates,
    limits_on,
    match_parity,
    tolerances,
)
from ditf.runtime.bundles.manifest import parse_manifest

LEAST = ("cosine_mean", "cosine_p01", "cosine_min", "matches_within_1px", "matches_within_patch")
MOST = ("relative_error", "channel_error", "scale_error", "max_abs_error")
FEATURES = ("cosine_mean", "cosine_p01", "cosine_min", "relative_error", "channel_error", "scale_error")


@pytest.fixture
def expected() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 200, 64)).astype(np.float32)


def failed(metrics: dict[str, float], precision: str) -> set[str]:
    return {gate.name for gate in gates(metrics, TOLERANCES[precision]) if not gate.ok}


@pytest.mark.parametrize("precision", TOLERANCES)
def test_equal_features_pass(expected, precision):
    metrics = feature_parity(expected.copy(), expected)
    assert metrics["relative_error"] == metrics["channel_error"] == metrics["max_abs_error"] == 0
    # Square roots in float64.
    assert metrics["cosine_min"] == pytest.approx(1.0, abs=1e-12)
    assert failed(metrics, precision) == set()


def test_float16_rounding_passes_float16_and_fails_float32(expected):
    metrics = feature_parity(expected.astype(np.float16), expected)
    assert failed(metrics, "float16") == set()
    assert "relative_error" in failed(metrics, "float32")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", ["one", "all"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_that_are_not_finite_fail_every_gate(expected, bad, count, dtype):
    actual = expected.astype(dtype)
    if count == "one":
        actual[1, 17, 5] = bad
    else:
        actual[:] = bad
    assert failed(feature_parity(actual, expected), "float16") == set(FEATURES)


def test_zero_features_fail(expected):
    metrics = feature_parity(np.zeros_like(expected), expected)
    assert metrics["cosine_mean"] == 0
    assert metrics["relative_error"] == pytest.approx(1.0)
    assert failed(metrics, "float16") == set(FEATURES)


def test_zero_reference_is_finite():
    metrics = feature_parity(np.ones((3, 4)), np.zeros((3, 4), np.float32))
    assert all(np.isfinite(value) for value in metrics.values())
    assert failed(metrics, "float16") == set(FEATURES) - {"scale_error"}


def test_one_wrong_token_is_found(expected):
    actual = expected.copy()
    actual[0, 3] = -actual[0, 3]
    metrics = feature_parity(actual, expected)
    assert metrics["cosine_min"] == pytest.approx(-1.0)
    assert "cosine_min" in failed(metrics, "float16")


def test_scale_is_found_where_the_cosine_is_blind(expected):
    metrics = feature_parity(expected * np.float32(1.01), expected)
    assert metrics["cosine_min"] == pytest.approx(1.0, abs=1e-6)
    assert failed(metrics, "float16") == {"relative_error", "channel_error", "scale_error"}


@pytest.mark.parametrize(("precision", "change"), [("float32", 5e-4), ("float16", 5e-3)])
def test_one_changed_channel_is_found_by_channel_error_alone(expected, precision, change):
    actual = expected.copy()
    actual[..., 9] += np.float32(change)
    metrics = feature_parity(actual, expected)
    # The rms of the reference is 1; over 64 channels the change is an eighth of it.
    assert metrics["channel_error"] == pytest.approx(change, rel=0.02)
    assert metrics["relative_error"] == pytest.approx(change / 8, rel=0.02)
    assert failed(metrics, precision) == {"channel_error"}


def test_rows_may_have_any_leading_shape(expected):
    actual = expected + np.float32(0.01)
    flat = feature_parity(actual.reshape(-1, 64), expected.reshape(-1, 64))
    assert feature_parity(actual, expected) == flat


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 1000), power=st.integers(-8, 1))
def test_errors_are_those_that_were_added(seed, power):
    rng = np.random.default_rng(seed)
    expected = rng.standard_normal((300, 16)).astype(np.float32)
    noise = rng.standard_normal((300, 16)) * 10.0**power
    metrics = feature_parity(expected + noise, expected)
    assert metrics["relative_error"] == pytest.approx(10.0**power, rel=0.1)  # 4,800 samples
    assert metrics["channel_error"] >= metrics["relative_error"] * (1 - 1e-12)
    assert metrics["max_abs_error"] == pytest.approx(np.abs(noise).max())
    assert metrics["cosine_min"] <= metrics["cosine_p01"] <= metrics["cosine_mean"] or power < -6


@pytest.mark.parametrize("name", LEAST)
def test_least_values(name):
    assert Gate(name, 0.99, 0.98).ok
    assert Gate(name, 0.98, 0.98).ok
    assert not Gate(name, 0.97, 0.98).ok


@pytest.mark.parametrize("name", MOST)
def test_largest_values(name):
    assert Gate(name, 0.01, 0.02).ok
    assert Gate(name, 0.02, 0.02).ok
    assert not Gate(name, 0.03, 0.02).ok


@pytest.mark.parametrize("name", LEAST + MOST)
def test_nan_fails(name):
    assert not Gate(name, float("nan"), 0.5).ok
    assert not Gate(name, 0.5, float("nan")).ok


def test_every_tolerance_has_a_direction():
    assert all(set(limits) <= {*LEAST, *MOST} for limits in TOLERANCES.values())


def test_gates_are_the_limits_that_were_measured():
    found = gates({"cosine_min": 0.9, "extra": 1.0, "relative_error": 0.0}, TOLERANCES["float16"])
    assert [gate.name for gate in found] == ["cosine_min", "relative_error"]
    assert [gate.ok for gate in found] == [False, True]
    assert json.loads(json.dumps(found[0].to_json())) == {
        "name": "cosine_min",
        "value": 0.9,
        "limit": 0.98,
        "ok": False,
    }


def test_float16_features_of_a_float32_graph_may_match_as_float16():
    measured = {"relative_error": 2e-4, "channel_error": 4e-4, "scale_error": 1e-6}
    exact, short, half = (
        tolerances(precision, measured, 8.0, short)
        for precision, short in (("float32", False), ("float32", True), ("float16", True))
    )
    changed = {name for name in exact if exact[name] != short[name]}
    assert changed == {"matches_within_1px", "matches_within_patch", "match_displacement"}
    assert all(short[name] == half[name] for name in changed)
    assert tolerances("int8", measured, 8.0, True) == tolerances("int8", measured, 8.0)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_tolerances_widen_with_measurement(precision):
    before = copy.deepcopy(TOLERANCES)
    exact = {"relative_error": 0.0, "channel_error": 0.0, "scale_error": 0.0, "cosine_min": 1.0}
    base = {**TOLERANCES[precision], "match_displacement": 8 * DISPLACEMENT[precision]}
    assert tolerances(precision, exact, 8) == base
    least = TOLERANCES[precision]["relative_error"]
    measured = {**exact, "relative_error": least / 4, "cosine_min": 0.5, "max_abs_error": 9.0}
    limits = tolerances(precision, measured, 8)
    assert limits == {**base, "relative_error": MEASURED_MARGIN * least / 4}
    assert tolerances(precision, {**measured, "relative_error": 0.5}, 8) == {
        **base,
        "relative_error": CEILINGS[precision]["relative_error"],
    }
    assert before == TOLERANCES


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_measurement_does_not_open_the_gates(bad):
    limits = tolerances("float16", dict.fromkeys(("relative_error", "channel_error", "scale_error"), bad), 8)
    assert not any(gate.ok for gate in gates({"relative_error": 1e9, "channel_error": 1e9}, limits))


@pytest.mark.parametrize("precision", TOLERANCES)
def test_wrong_scale_does_not_excuse_itself(expected, precision):
    # What the exporter's rehearsal does: the gates of a measurement, widened by that same measurement. The
    # cosines are blind to a scale, so an error that no rounding explains has to fail by itself.
    metrics = feature_parity(expected * np.float32(1.5), expected)
    assert not all(gate.ok for gate in gates(metrics, tolerances(precision, metrics, 8)))


def manifest_of(precision, measured, **changes):
    """A manifest with what `limits_on` reads."""
    document = json.loads(MANIFEST.replace("PRECISION", precision))
    return parse_manifest(Path("b"), json.dumps({**document, "measured": measured, **changes}).encode())


MANIFEST = """{"schema": 1, "model": {"id": "m", "family": "dit"}, "layer": 1, "layer_name": "1",
"timestep": 1, "prompt": null, "class_label": null, "seed": 0, "ensemble": 1, "noise": "baked",
"size": [8, 8], "grid": [1, 1], "channels": 4, "batch": 1, "adaln": true,
"discard": {"channels": [], "stage": "before", "source": "none"}, "precision": "PRECISION",
"recipe": {"float32": {}}, "parts": {}, "opset": 20, "conditioning": "bake",
"tolerances": {"relative_error": 5e-3, "channel_error": 2e-2, "scale_error": 1e-3},
"rehearsal": {"relative_error": 8e-4, "channel_error": 3e-3, "scale_error": 1e-6,
"cosine_mean": 0.9999997, "cosine_p01": 0.9999994, "cosine_min": 0.9999991},
"golden": {}, "versions": {}, "command": "", "files": {}}"""
SEEN = {"relative_error": 4e-4, "channel_error": 1.2e-3, "scale_error": 2e-4}
SEEN |= {"cosine_mean": 1 - 1e-7, "cosine_p01": 1 - 2e-7, "cosine_min": 1 - 4e-7}


def test_limits_on_the_backend_that_was_measured():
    limits = limits_on(ONNXRUNTIME_CPU, manifest_of("float16", {ONNXRUNTIME_CPU: SEEN}))
    for name in ("relative_error", "channel_error", "scale_error"):
        assert limits[name] == pytest.approx(2.5 * SEEN[name])
    assert 1 - limits["cosine_min"] == pytest.approx(6.25 * 4e-7)
    assert limits["matches_within_1px"] == TOLERANCES["float16"]["matches_within_1px"]
    lucky = limits_on(ONNXRUNTIME_CPU, manifest_of("float16", {ONNXRUNTIME_CPU: dict.fromkeys(SEEN, 0.0)}))
    assert lucky["relative_error"] == FLOORS["float16"]["relative_error"]


def test_limits_elsewhere_are_the_tolerances():
    manifest = manifest_of("float16", {ONNXRUNTIME_CPU: SEEN})
    for backend in ("tensorrt", "onnxruntime", ""):
        assert limits_on(backend, manifest) == {**TOLERANCES["float16"], **manifest.tolerances}


def test_the_emulation_stands_in_where_no_backend_was_measured():
    limits = limits_on(ONNXRUNTIME_CPU, manifest_of("float16", {}))
    assert limits["relative_error"] == pytest.approx(2.5 * 8e-4)


def test_a_bundle_from_before_keeps_its_limits():
    """It has no limit of the scale either, which is never above the relative error."""
    tolerances = {"relative_error": 5e-3, "channel_error": 2e-2}
    limits = limits_on(ONNXRUNTIME_CPU, manifest_of("float16", None, tolerances=tolerances))
    assert limits == {**TOLERANCES["float16"], **tolerances, "scale_error": 5e-3}


def test_float16_features_of_a_float32_graph_have_float16_floors():
    measured = {ONNXRUNTIME_CPU: dict.fromkeys(SEEN, 0.0)}
    found = [
        limits_on(ONNXRUNTIME_CPU, manifest_of("float32", measured, features_dtype=dtype))["relative_error"]
        for dtype in ("float16", "float32")
    ]
    assert found == [FLOORS["float16"]["relative_error"], FLOORS["float32"]["relative_error"]]


@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_a_scale_is_told_from_rounding(expected, factor):
    metrics = feature_parity((expected * np.float32(factor)).astype(np.float16), expected)
    assert metrics["scale_error"] == pytest.approx(1e-3, rel=0.02)
    assert feature_parity(expected.astype(np.float16), expected)["scale_error"] < 1e-5


def test_match_parity():
    expected = np.array([[10, 10]] * 5, np.float32)
    actual = expected + np.array([[0, 0], [1, 1], [2, 0], [0, 2], [30, 40]], np.float32)
    metrics = match_parity(actual, expected, patch=(2, 1))  # cells 2 px high and 1 px wide
    assert metrics["matches_same"] == 0.2
    assert metrics["matches_within_1px"] == 0.4
    assert metrics["matches_within_patch"] == 0.6
    assert metrics["match_displacement"] == pytest.approx((2**0.5 + 2 + 2 + 50) / 5)


def test_matches_that_are_nan_are_wrong():
    expected = np.zeros((4, 2), np.float32)
    metrics = match_parity(np.full((4, 2), np.nan), expected, (8, 8))
    assert metrics["matches_same"] == metrics["matches_within_1px"] == metrics["matches_within_patch"] == 0
