"""Plots of a calibration: where massive channels appear and how AdaLN scales them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditf.calib.channels import FLOAT16_MAX, MASSIVE_RATIO
from ditf.calib.recipe import HEADROOM, INNER, LIMIT

_COLOURS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#8d5a97", "#2e4057")


def plot_calibration(document: Mapping[str, Any], path: Path) -> None:
    """Draw calibration.json in four panels.

    They show the sorted channel means of the residual for each layer, the ratio of the massive channels to
    the median channel over the layers, AdaLN's scale on them and on all channels, and the largest values
    beside float16's limit.

    Args:
        document: calibration.json, as `ditf calibrate` writes it.
        path: the file to write, PNG, SVG or PDF.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    layers = document["layers"]
    channels = _massive_anywhere(layers)
    _sorted_means(axes[0][0], layers)
    _ratios(axes[0][1], layers, channels)
    _modulation(axes[1][0], layers, channels)
    _largest(axes[1][1], layers, document["ranges"])
    what = f"t={document['timestep']}, {document['conditions'][0]!r}"
    figure.suptitle(f"{document['model']}: {document['images']['count']} images, {what}")
    figure.savefig(path, dpi=110)


def _massive_anywhere(layers: list[Mapping[str, Any]]) -> list[int]:
    """Channels that are massive in some layer, the strongest first, at most one per colour."""
    strongest: dict[int, float] = {}
    for layer in layers:
        for entry in layer["image"]["massive_channels"]:
            channel, ratio = entry["channel"], entry["ratio"]
            strongest[channel] = max(strongest.get(channel, 0.0), ratio)
    return sorted(strongest, key=lambda channel: -strongest[channel])[: len(_COLOURS)]


def _sorted_means(axis: Any, layers: list[Mapping[str, Any]]) -> None:
    for index, layer in enumerate(layers):
        means = np.sort(np.asarray(layer["image"]["mean_abs"]))[::-1]
        shade = 0.85 - 0.75 * index / max(len(layers) - 1, 1)
        axis.loglog(np.arange(1, len(means) + 1), np.maximum(means, 1e-9), color=str(shade), linewidth=1)
    axis.set(title="residual: channels by size (dark: later layers)", xlabel="rank", ylabel="mean |x|")


def _ratios(axis: Any, layers: list[Mapping[str, Any]], channels: list[int]) -> None:
    numbers = [layer["layer"] for layer in layers]
    for channel, colour in zip(channels, _COLOURS, strict=False):
        ratios = []
        for layer in layers:
            means = np.asarray(layer["image"]["mean_abs"])
            ratios.append(means[channel] / max(layer["image"]["median_channel"], 1e-30))
        axis.semilogy(numbers, ratios, color=colour, marker="o", markersize=3, label=f"channel {channel}")
    axis.axhline(MASSIVE_RATIO, color="black", linewidth=0.8, linestyle="--", label="massive")
    axis.set(title="mean |x| over the median channel's", xlabel="layer")
    axis.legend(fontsize=8)


def _modulation(axis: Any, layers: list[Mapping[str, Any]], channels: list[int]) -> None:
    known = [layer for layer in layers if layer.get("scale")]
    numbers = [layer["layer"] for layer in known]
    if known:
        scales = np.abs(np.asarray([layer["scale"] for layer in known]))
        low, middle, high = np.percentile(scales, (5, 50, 95), axis=1)
        axis.fill_between(numbers, low, high, color="0.85", label="5 to 95 % of all channels")
        axis.plot(numbers, middle, color="0.4", label="median channel")
        for channel, colour in zip(channels, _COLOURS, strict=False):
            axis.plot(
                numbers,
                scales[:, channel],
                color=colour,
                marker="o",
                markersize=3,
                label=f"channel {channel}",
            )
        axis.legend(fontsize=8)
    axis.set(title="AdaLN: |1 + scale| of each layer's first norm", xlabel="layer")


def _largest(axis: Any, layers: list[Mapping[str, Any]], ranges: list[Mapping[str, Any]]) -> None:
    numbers = [layer["layer"] for layer in layers]
    values = [layer["image"]["max_abs"] for layer in layers]
    axis.semilogy(numbers, values, color="black", marker="o", markersize=3, label="image tokens")
    text = [(layer["layer"], layer["text"]["max_abs"]) for layer in layers if layer["text"]]
    if text:
        axis.semilogy(*zip(*text, strict=True), color="0.5", marker="o", markersize=3, label="text tokens")
    for stream, style in (("image", "-"), ("text", ":")):
        emitted = [(n, largest_of(ranges, layer, ("emitted",), stream)) for n, layer in enumerate(layers)]
        known = [(numbers[n], value) for n, value in emitted if value is not None]
        if known:
            label = f"what a branch adds, {stream}"
            axis.semilogy(
                *zip(*known, strict=True), style, color="#00798c", marker="s", markersize=3, label=label
            )
    inner = [(n, largest_of(ranges, layer, INNER)) for n, layer in enumerate(layers)]
    known = [(numbers[n], value) for n, value in inner if value is not None]
    if known:
        axis.semilogy(
            *zip(*known, strict=True), color="#edae49", marker="^", markersize=3, label="inside a branch"
        )
    axis.axhline(FLOAT16_MAX, color="#d1495b", linewidth=0.8, linestyle="--", label="float16's limit")
    axis.axhline(LIMIT, color="#d1495b", linewidth=0.8, linestyle=":", label=f"{HEADROOM:g} times below")
    axis.set(title="largest |x| of residual and branches", xlabel="layer")
    axis.legend(fontsize=8)


def largest_of(
    ranges: Sequence[Mapping[str, Any]],
    layer: Mapping[str, Any],
    kinds: Sequence[str],
    stream: str | None = None,
) -> float | None:
    """The largest value of some kinds inside one block of calibration.json, or None."""
    found = [
        entry["max_abs"]
        for entry in ranges
        if entry["kind"] in kinds
        and entry["name"].startswith(layer["module"] + ".")
        and stream in (None, entry["stream"])
    ]
    return max(found, default=None)
