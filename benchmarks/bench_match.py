"""Matching time and peak memory of ditf against the published way, on one thread (processor time).

Two maps of 1152 x 40 x 40 features are matched at the 480 x 640 pixels of their images. The published
way upsamples both maps in PyTorch, normalises the target's pixels, multiplies and takes the argmax. It
is measured twice, with both maps upsampled once a pair, as the evaluation code does:

    published, in one product   all points in one matmul, the target normalised once: the best that can
                                be made of it, and what the ratios are against
    published, as written       the evaluation code normalises every target pixel anew for each point
                                (timed once, up to 20 points)
    ditf, numpy                 what Model.match runs
    ditf, match.onnx            what Model.match_with_graph runs: the bundle's graph on ONNX Runtime

All sides must answer with the same pixels, or the script fails. Points lie two cells or more from the
border: there replicated edges make whole strips of pixels tie exactly, which only ditf breaks by rule.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import (
    in_child,
    interleave,
    open_session,
    paired_ratio,
    peak_bytes,
    pin_threads,
    provenance,
    reset_peak_memory,
    resident_bytes,
    say,
    summary,
    wait_until_idle,
    write_result,
)
from torch.nn import functional

from ditf.cli.console import bytes_text
from ditf.runtime import FeatureMap
from ditf.runtime.bundle import MATCH
from ditf.runtime.match_graph import run_match_graph
from ditf.runtime.matching import match_points

THREADS = 1
CHANNELS, GRID, SIZE = 1152, (40, 40), (480, 640)
COUNTS = (1, 20, 256)
PEER, WRITTEN, NUMPY, GRAPH = (
    "published, in one product",
    "published, as written",
    "ditf, numpy",
    "ditf, match.onnx",
)
WRITTEN_UP_TO = 20

Match = Callable[[FeatureMap, FeatureMap, np.ndarray], np.ndarray]
"""Source, target and integer points [N, 2] -> points [N, 2] in the target; (x, y) px."""


def main() -> None:
    """Export a graph of the size, time the sides in turns, measure their memory, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wait", type=float, default=0, metavar="MINUTES", help="for an idle machine")
    arguments = parser.parse_args()
    pin_threads(THREADS)
    cases = []
    with tempfile.TemporaryDirectory(prefix="ditf-bench-") as name:
        say("exporting")
        graph = in_child(export_match_graph, Path(name))
        wait_until_idle(arguments.wait)
        origin = provenance(THREADS)
        for count in COUNTS:
            say(f"{count} points, {arguments.repeats} rounds after a warm-up")
            case = in_child(measure, graph, count, arguments.repeats)
            names = [name for name in case["seconds"] if name != WRITTEN]
            case["peak_bytes"] = {name: in_child(peak, name, graph, count) for name in names}
            cases.append(case)
    setting = {"channels": CHANNELS, "grid": GRID, "size": SIZE, "dtype": "float32"}
    write_result("match", origin, {"setting": setting, "cases": cases}, rows(cases))


def export_match_graph(folder: Path) -> Path:
    """The match.onnx of a float32 bundle of these features: a one-block DiT exported at layer 0."""
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    from ditf.export.exporter import export_bundle
    from ditf.export.options import ExportOptions
    from ditf.export.pretrained import quieten_libraries

    quieten_libraries()
    patch = 8
    model = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=CHANNELS // 16,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        sample_size=GRID[0] * patch,
        patch_size=patch,
        num_embeds_ada_norm=1,
    )
    model.save_pretrained(folder / "dit/transformer")
    DDPMScheduler().save_pretrained(folder / "dit/scheduler")
    bundle = export_bundle(ExportOptions(model=str(folder / "dit"), layer="0", output=folder / "bundle"))
    return bundle / MATCH


def inputs(count: int) -> tuple[FeatureMap, FeatureMap, np.ndarray]:
    """A source, the same shifted by a cell and noisy as target, and points. Seeded."""
    rng = np.random.default_rng(0)
    source, noise = rng.standard_normal((2, CHANNELS, *GRID)).astype(np.float32)
    target = np.roll(source, (1, 1), axis=(1, 2)) + 0.5 * noise
    cell = (SIZE[0] // GRID[0], SIZE[1] // GRID[1])
    x = rng.integers(2 * cell[1], SIZE[1] - 3 * cell[1], count)
    y = rng.integers(2 * cell[0], SIZE[0] - 3 * cell[0], count)
    return FeatureMap(source, SIZE), FeatureMap(target, SIZE), np.stack([x, y], axis=1)


def _upsample(features: FeatureMap) -> torch.Tensor:
    maps = torch.from_numpy(features.array)[None]
    return functional.interpolate(maps, features.image_size, mode="bilinear")[0]


@torch.inference_mode()
def published(source: FeatureMap, target: FeatureMap, points: np.ndarray) -> np.ndarray:
    """Upsample, normalise, multiply, argmax; all points at once."""
    queries = functional.normalize(_upsample(source)[:, points[:, 1], points[:, 0]], dim=0)
    pixels = functional.normalize(_upsample(target).flatten(1), dim=0)
    best = (queries.T @ pixels).argmax(dim=1).numpy()
    return np.stack([best % target.image_size[1], best // target.image_size[1]], axis=1)


@torch.inference_mode()
def published_as_written(source: FeatureMap, target: FeatureMap, points: np.ndarray) -> np.ndarray:
    """The same, with the target's pixels normalised for every point."""
    source_pixels, target_pixels = _upsample(source), _upsample(target)
    found = []
    for x, y in points:
        query = functional.normalize(source_pixels[:, y, x][None])
        cosines = functional.normalize(target_pixels.flatten(1).T) @ query.T
        row, column = np.unravel_index(cosines.numpy().argmax(), target.image_size)
        found.append((column, row))
    return np.array(found)


class OneThread:
    """A session as the runtime's backends have it, on one thread."""

    outputs = ("points", "scores")

    def __init__(self, graph: Path) -> None:
        self._session = open_session(graph, THREADS)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(feeds)), strict=True))


def sides(graph: Path) -> dict[str, Match]:
    """Every side by name; opens the graph."""
    session = OneThread(graph)
    return {
        PEER: published,
        WRITTEN: published_as_written,
        NUMPY: lambda source, target, points: match_points(source, target, points).points,
        GRAPH: lambda source, target, points: run_match_graph(session, GRID, source, target, points).points,
    }


def measure(graph: Path, count: int, repeats: int) -> dict[str, Any]:
    """Seconds and ratios of every side at a number of points; fails unless all give the same pixels."""
    torch.set_num_threads(THREADS)
    arguments = inputs(count)
    matchers = sides(graph)
    as_written = matchers.pop(WRITTEN)
    expected = published(*arguments)
    for name, match in matchers.items():
        np.testing.assert_array_equal(match(*arguments), expected, err_msg=name)
    timed = {name: (lambda number, match=match: match(*arguments)) for name, match in matchers.items()}
    seconds, disturbance = interleave(timed, repeats)
    ratios = {f"{PEER} / {name}": paired_ratio(seconds[PEER], seconds[name]) for name in (NUMPY, GRAPH)}
    if count <= WRITTEN_UP_TO:
        start = time.process_time()
        found = as_written(*arguments)
        seconds[WRITTEN] = [time.process_time() - start]
        np.testing.assert_array_equal(found, expected, err_msg=WRITTEN)
    return {
        "points": count,
        "positions_identical": True,  # asserted above
        "timing": disturbance,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": ratios,
    }


def peak(name: str, graph: Path, count: int) -> int:
    """Bytes by which one match raises the memory of a fresh process, its inputs and graph loaded."""
    torch.set_num_threads(THREADS)
    match, arguments = sides(graph)[name], inputs(count)
    reset_peak_memory()
    before = resident_bytes()
    match(*arguments)
    return peak_bytes() - before


def rows(cases: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table: a line for each side at each number of points."""
    lines: list[tuple[str, ...]] = [("points", "", "time", "x faster", "peak memory", "x smaller")]
    for case in cases:
        for name, seconds in case["seconds"].items():
            ratio = case["ratios"].get(f"{PEER} / {name}")
            used = case["peak_bytes"].get(name)
            lines.append(
                (
                    str(case["points"]),
                    name,
                    f"{seconds['median'] * 1e3:.1f} ms",
                    f"{ratio['median']:.0f}" if ratio else "",
                    bytes_text(used) if used else "",
                    f"{case['peak_bytes'][PEER] / used:.1f}" if used and ratio else "",
                )
            )
    return lines


if __name__ == "__main__":
    main()
