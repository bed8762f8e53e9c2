"""Plots of timings: the distribution of every part's calls beside the baseline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ditf.calib.latency import Timing


def plot_latency(rows: Sequence[Timing], baseline: Mapping[str, Timing], title: str, path: Path) -> None:
    """Draw the cumulative distribution of the calls' times, one panel per part.

    Args:
        baseline: rows of an earlier run by name; may be empty.
        path: the file to write, PNG, SVG or PDF.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * lines + 0.4), layout="constrained")
    figure.suptitle(title, fontsize="small")
    panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
    for panel, row in zip(panels, rows, strict=False):
        for label, one in (("baseline", baseline.get(row.name)), ("now", row)):
            if one is None:
                continue
            times = np.sort(np.ravel(one.samples)) * 1e3
            share = np.arange(1, len(times) + 1) / len(times)
            panel.step(times, share, where="post", label=f"{label}, p50 {np.median(times):.2f} ms")
        panel.set_title(row.name, fontsize="medium")
        panel.set_xlabel("milliseconds")
        panel.set_ylim(0, 1.02)
        panel.legend(fontsize="x-small", loc="lower right")
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("share of calls")
    figure.savefig(path, dpi=110)
