"""Parity: metrics of how close features and matches are to the unmodified model's, and their gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.runtime.bundles.manifest import Manifest

TOLERANCES: dict[str, dict[str, float]] = {
    "float32": {
        "cosine_mean": 0.999999,
        "cosine_p01": 0.99999,
        "cosine_min": 0.9999,
        "relative_error": 1e-4,
        "channel_error": 3e-4,
        "scale_error": 3e-5,
        "matches_within_1px": 0.98,
        "matches_within_patch": 0.99,
    },
    "float16": {
        "cosine_mean": 0.999,
        "cosine_p01": 0.995,
        "cosine_min": 0.98,
        "relative_error": 1e-3,
        "channel_error": 3e-3,
        "scale_error": 3e-4,
        "matches_within_1px": 0.9,
        "matches_within_patch": 0.95,
    },
    "int8": {
        "cosine_mean": 0.99,
        "cosine_p01": 0.97,
        "cosine_min": 0.9,
        "relative_error": 2e-2,
        "channel_error": 6e-2,
        "scale_error": 6e-3,
        "matches_within_1px": 0.6,
        "matches_within_patch": 0.8,
    },
    "bfloat16": {
        "cosine_mean": 0.99,
        "cosine_p01": 0.97,
        "cosine_min": 0.9,
        "relative_error": 8e-3,
        "channel_error": 2.4e-2,
        "scale_error": 3e-3,
        "matches_within_1px": 0.6,
        "matches_within_patch": 0.8,
    },
}
"""Gates per precision. Cosines and shares are lower limits, errors are upper limits. The limits on errors are
what rounding alone causes in a shallow model: another order of summation in float32, 11-bit significands in
float16, 8-bit ones in bfloat16. `tolerances` widens them to the error measured on the model at hand, for
backends whose kernels were not measured; `limits_on` narrows them where they were."""

CEILINGS: dict[str, dict[str, float]] = {
    "float32": {"relative_error": 1e-3, "channel_error": 3e-3, "scale_error": 3e-4},
    "float16": {"relative_error": 5e-2, "channel_error": 0.15, "scale_error": 8e-4},
    "bfloat16": {"relative_error": 0.15, "channel_error": 0.5, "scale_error": 1e-2},
    "int8": {"relative_error": 0.15, "channel_error": 0.5, "scale_error": 2e-2},
}
"""Upper limits that `tolerances` never passes: at an error of 5e-2 a cosine of 0.999 is just possible.
Rounding is not aligned with the features, so it hardly changes their scale."""

ONNXRUNTIME_CPU = "onnxruntime-cpu"
"""ONNX Runtime on an x86-64 CPU, the backend whose own parity an export measures."""

MEASURED_BACKEND_MARGIN = 2.5
"""Limit of an error over what the same backend gave at export. With the kernels of other x86-64 CPUs (SSE,
AVX, AVX2, AVX-512, with and without VNNI) and other numbers of threads, errors differ by a fifth, and the
largest error of a channel of a float32 graph by two fifths."""

FLOORS: dict[str, dict[str, float]] = {
    "float32": {"relative_error": 2e-6, "channel_error": 8e-6, "scale_error": 2e-6},
    "float16": {"relative_error": 2.5e-4, "channel_error": 8e-4, "scale_error": 3e-4},
    "bfloat16": {"relative_error": 2e-3, "channel_error": 6e-3, "scale_error": 3e-3},
    "int8": {"relative_error": 2e-3, "channel_error": 6e-3, "scale_error": 3e-3},
}
"""Limits that `limits_on` never passes: about what one rounding to the type, or for float32 the sums of a few
blocks, cause by themselves. A bundle may have been lucky at export."""

DISPLACEMENT = {"float32": 0.25, "float16": 2.0, "bfloat16": 4.0, "int8": 4.0}
"""Largest mean displacement of matches, in cells of the feature map."""

MEASURED_MARGIN = 8.0
"""Limit of an error over its measured value: enough for another backend's kernels, not for a mistake."""

METRICS = (
    *("cosine_mean", "cosine_p01", "cosine_min"),
    *("relative_error", "channel_error", "scale_error", "max_abs_error"),
    *("matches_same", "matches_within_1px", "matches_within_patch", "match_displacement"),
)
"""The metrics of features and of matches."""

WHOLE = "whole_"
"""Prefix of metrics that compare with the model without the approximation (--vae, --text-tokens)."""

_AT_MOST = frozenset(
    {"relative_error", "channel_error", "scale_error", "max_abs_error", "match_displacement", "file_error"}
)


def tolerances(
    precision: str, measured: Mapping[str, float], cell: float, short: bool = False
) -> dict[str, float]:
    """Limits for a bundle: those of its precision, with errors widened to a margin over measured ones.

    Args:
        precision: name of the bundle's precision.
        measured: feature parity of the same graph at export, with every value rounded to the precision.
        cell: side of a feature cell, px.
        short: whether the features are float16, so that near-ties among matches may be decided otherwise.
    """
    matched = "float16" if short and precision == "float32" else precision
    limits = {**TOLERANCES[precision], "match_displacement": DISPLACEMENT[matched] * cell}
    limits |= {name: limit for name, limit in TOLERANCES[matched].items() if name.startswith("matches")}
    for name, ceiling in CEILINGS[precision].items():
        limits[name] = min(ceiling, max(limits[name], MEASURED_MARGIN * measured[name]))
    return limits


def limits_on(backend: str, manifest: Manifest) -> dict[str, float]:
    """The limits of a bundle's metrics on a backend.

    Every backend has the bundle's tolerances. On the backend that the export measured, an error may be
    `MEASURED_BACKEND_MARGIN` times what it was there, and 1 - cosine, which is quadratic in the error, the
    square of that. Where ONNX Runtime was not installed at export, the figures of the emulation stand in:
    they are a little larger.

    Args:
        backend: `ONNXRUNTIME_CPU`, or any other name.
    """
    precision = manifest.precision
    limits = {**TOLERANCES[precision], **manifest.tolerances}
    if manifest.measured is None:  # a bundle from before scale_error, which never exceeds the relative error
        limits["scale_error"] = limits["relative_error"]
        return limits
    measured = manifest.measured.get(backend, manifest.rehearsal)
    if backend != ONNXRUNTIME_CPU or not measured:
        return limits
    rounded = precision == "float32" and manifest.features_dtype == "float16"
    floors = FLOORS["float16" if rounded else precision]
    for name, floor in floors.items():
        if name in measured:
            limits[name] = min(limits[name], max(floor, MEASURED_BACKEND_MARGIN * measured[name]))
    least = (4 * floors["relative_error"]) ** 2
    for name in ("cosine_mean", "cosine_p01", "cosine_min"):
        if name in measured:
            allowed = max(least, MEASURED_BACKEND_MARGIN**2 * (1 - measured[name]))
            limits[name] = max(limits[name], 1 - allowed)
    return limits


@dataclass(frozen=True)
class Gate:
    """One gated metric, as it stands in --json."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        # NaN fails both comparisons.
        at_most = self.name.removeprefix(WHOLE) in _AT_MOST
        return self.value <= self.limit if at_most else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "limit": self.limit, "ok": self.ok}


def feature_parity(actual: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Compare token rows.

    Args:
        actual, expected: [..., C]; `expected` is float32 from the unmodified model.

    Returns:
        cosine_mean, cosine_p01 and cosine_min over tokens; relative_error, |a - e| / |e| over all values;
        channel_error, the largest rms(a - e) of a channel over rms(e) of all channels, which a single wrong
        weight moves most; scale_error, |<a, e> / <e, e> - 1|, the factor by which all features are too large,
        which rounding hardly moves; max_abs_error. All are NaN or infinite if the actual features are.
    """
    a = actual.reshape(-1, actual.shape[-1]).astype(np.float64)
    e = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(e, axis=1)
        cosine = np.einsum("nc,nc->n", a, e) / np.maximum(norms, 1e-30)
        relative = np.linalg.norm(a - e) / max(float(np.linalg.norm(e)), 1e-30)
        rms = max(float(np.sqrt((e * e).mean())), 1e-30)
        channel = np.sqrt(((a - e) ** 2).mean(axis=0)).max() / rms
        scale = abs(((a - e) * e).sum()) / max(float((e * e).sum()), 1e-30)
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_p01": float(np.percentile(cosine, 1)),
        "cosine_min": float(cosine.min()),
        "relative_error": float(relative),
        "channel_error": float(channel),
        "scale_error": float(scale),
        "max_abs_error": float(np.abs(a - e).max()),
    }


def worst(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The worst value of each metric over several measurements; NaN counts as the worst."""
    return {
        name: float((np.max if name in _AT_MOST else np.min)([metrics[name] for metrics in measured]))
        for name in measured[0]
    }


def match_parity(actual: np.ndarray, expected: np.ndarray, patch: tuple[float, float]) -> dict[str, float]:
    """Compare matched points [N, 2], (x, y) px.

    Args:
        patch: (height, width) of one feature cell, px.

    Returns:
        matches_same, matches_within_1px and matches_within_patch, which are shares of the points, and
        match_displacement, the mean distance in pixels.
    """
    offset = np.abs(actual.astype(np.float64) - expected)
    distance = np.linalg.norm(offset, axis=1)
    return {
        "matches_same": float((distance == 0).mean()),
        "matches_within_1px": float((offset.max(axis=1) <= 1).mean()),
        "matches_within_patch": float((offset <= (patch[1], patch[0])).all(axis=1).mean()),
        "match_displacement": float(distance.mean()),
    }


def gates(metrics: Mapping[str, float], limits: Mapping[str, float]) -> list[Gate]:
    """Gate the metrics in the order of the limits; limits of metrics that were not measured are left out."""
    return [Gate(name, metrics[name], limit) for name, limit in limits.items() if name in metrics]
