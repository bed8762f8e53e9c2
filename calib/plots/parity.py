"""Plots of parity: the error of features over the image, and the matches that moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditf.calib.golden_parity import GoldenResult, take_rows
from ditf.runtime.bundles.golden_file import Golden

_LEAST = 1e-9  # below float32's resolution of a cosine


def plot_parity(
    golden: Golden, result: GoldenResult, grid: tuple[int, int], limits: Mapping[str, float], path: Path
) -> None:
    """Draw three panels: errors over the first image, their histogram, and matches on the second image.

    The histogram shows the gates. On the second image a line joins the model's match and the bundle's match
    if they differ by more than a pixel.

    Args:
        grid: (h, w) of the features.
        limits: limits of the gates by metric.
        path: the file to write, PNG, SVG or PDF.
    """
    from matplotlib.figure import Figure

    errors = _errors(golden, result)
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    axes = figure.subplots(1, 3)
    _error_map(figure, axes[0], golden, errors[0], grid)
    _histogram(axes[1], errors, limits)
    _moved(axes[2], golden, result)
    figure.savefig(path, dpi=110)


def _errors(golden: Golden, result: GoldenResult) -> np.ndarray:
    """1 - cosine of every sampled token, [2, R]; 1 where a token is not finite."""
    actual = take_rows(result.maps, golden["rows"]).astype(np.float64)
    expected = golden["features"].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        product = (actual * expected).sum(axis=2)
        norms = np.linalg.norm(actual, axis=2) * np.linalg.norm(expected, axis=2)
        errors = 1.0 - product / np.maximum(norms, 1e-30)
    return np.clip(np.nan_to_num(errors, nan=1.0), _LEAST, None)


def _error_map(figure: Any, axis: Any, golden: Golden, errors: np.ndarray, grid: tuple[int, int]) -> None:
    from matplotlib.colors import LogNorm

    height, width = golden["images"].shape[1:3]
    cells = np.full(grid[0] * grid[1], np.nan)
    cells[golden["rows"][0]] = errors
    axis.imshow(golden["images"][0].mean(axis=2), cmap="gray", extent=(0, width, height, 0), alpha=0.6)
    low, high = float(errors.min()), float(errors.max())
    picture = axis.imshow(
        cells.reshape(grid),
        extent=(0, width, height, 0),
        cmap="inferno",
        alpha=0.75,
        norm=LogNorm(low, max(high, low * 1.01)),
    )
    figure.colorbar(picture, ax=axis, shrink=0.8)
    axis.set(title="1 - cosine of each sampled token", xticks=[], yticks=[])


def _histogram(axis: Any, errors: np.ndarray, limits: Mapping[str, float]) -> None:
    bins = np.geomspace(errors.min(), max(errors.max(), errors.min() * 10), 40)
    axis.hist(errors.flatten(), bins=bins, color="#00798c")
    axis.set_xscale("log")
    for name, colour in (("cosine_p01", "#edae49"), ("cosine_min", "#d1495b")):
        if name in limits:
            axis.axvline(1 - limits[name], color=colour, linestyle="--", label=f"gate of {name}")
    axis.legend(fontsize=8)
    axis.set(title=f"{errors.size} tokens", xlabel="1 - cosine with the unmodified model", ylabel="tokens")


def _moved(axis: Any, golden: Golden, result: GoldenResult) -> None:
    axis.imshow(golden["images"][1])
    expected = golden["match_points"]
    axis.scatter(*expected.T, s=14, facecolors="none", edgecolors="white", label="the model's")
    axis.set(title="features are not finite: no matches", xticks=[], yticks=[])
    if result.matches is not None:
        actual = result.matches.points
        moved = np.abs(actual - expected).max(axis=1) > 1
        axis.scatter(*actual[~moved].T, s=5, color="#66a182", label="the bundle's, within a pixel")
        axis.scatter(*actual[moved].T, s=9, color="#d1495b", label="moved")
        for start, end in zip(expected[moved], actual[moved], strict=True):
            axis.plot(*np.stack([start, end]).T, color="#d1495b", linewidth=1)
        axis.set(title=f"{moved.sum()} of {len(moved)} matches moved by more than a pixel")
    axis.legend(fontsize=8, loc="lower right")
