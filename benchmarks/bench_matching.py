"""`argmax` against the published way at many sizes: processor time and peak memory, one thread each.

A source map and the same, shifted and noisy, as target, 40x40 cells (640x480) or 68x120 (1920x1080, 16 px a
cell), are matched at the pixels of their images:

    published    both maps upsampled in PyTorch, the target normalised, one product, argmax
    by channels  the same sums, 64 channels upsampled at a time: what is left where that does not fit
    ditf         match_points, numpy

Every side runs in a process of its own, once after a small warm-up; memory is what matching adds to a process
that holds the maps. Where the published way would take more than 12 GB (the upsampled target, its normalised
copy, the scores) it is left out, and the table says so; `by channels` then runs for 20 queries at 1152
channels only, because it takes minutes. Points lie two cells or more from the border: there replicated edges
make strips of pixels tie exactly, which only ditf breaks by rule.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from harness import Bench, in_child, reset_peak_memory, say

from ditf.calib.machine import peak_bytes, resident_bytes
from ditf.cli.support.output import bytes_text
from ditf.runtime import FeatureMap
from ditf.runtime.matching.points import match_points

THREADS = 1
CHANNELS = (1152, 1536, 3072)
IMAGES = {(480, 640): (40, 40), (1080, 1920): (68, 120)}
COUNTS = (1, 20, 1000)
LIMIT = 12e9  # bytes
TILE = 64  # channels
PUBLISHED, BY_CHANNELS, DITF = "published", "by channels", "ditf"


def main() -> None:
    """Run every case, compare positions, write the result."""
    bench = Bench(__doc__, THREADS)
    bench.parse()
    bench.start()
    cases = []
    for size, grid in ({(48, 64): (4, 4)} if bench.smoke else IMAGES).items():
        for channels in CHANNELS[: 1 if bench.smoke else None]:
            for count in COUNTS[: 2 if bench.smoke else None]:
                case = measure(channels, grid, size, count)
                say(" | ".join(row_of(case)))
                cases.append(case)
    compared = [case for case in cases if "identical" in case]
    result = {
        "limit_bytes": LIMIT,
        "cases": cases,
        "positions_compared": sum(case["points"] for case in compared),
        "positions_identical": sum(case["identical"] for case in compared),
    }
    heading = (
        "image",
        "channels",
        "points",
        "peer",
        "time",
        "ditf",
        "faster",
        "memory",
        "ditf",
        "smaller",
        "same",
    )
    bench.write("matching", result, [heading, *(row_of(case) for case in cases)])


def measure(channels: int, grid: tuple[int, int], size: tuple[int, int], count: int) -> dict[str, Any]:
    """Measure one case: every side's seconds, bytes and positions, and their ratios."""
    pixels = size[0] * size[1]
    needed = 4 * pixels * (2 * channels + count)
    case: dict[str, Any] = {
        "channels": channels, "grid": grid, "size": size, "points": count, "published_needs_bytes": needed
    }  # fmt: skip
    ours = in_child(run, DITF, channels, grid, size, count)
    if needed <= LIMIT:
        peer = PUBLISHED
    elif (channels, count) == (CHANNELS[0], 20):
        peer = BY_CHANNELS
    else:
        return {**case, DITF: {key: ours[key] for key in ("seconds", "peak_bytes")}}
    theirs = in_child(run, peer, channels, grid, size, count)
    same = (ours.pop("positions") == theirs.pop("positions")).all(axis=1)
    ratios = {key: theirs[key] / ours[key] for key in ("seconds", "peak_bytes")}
    return {**case, "peer": peer, DITF: ours, peer: theirs, "ratios": ratios, "identical": int(same.sum())}


def run(side: str, channels: int, grid: tuple[int, int], size: tuple[int, int], count: int) -> dict[str, Any]:
    """Run one side in this process."""
    match = {PUBLISHED: published, BY_CHANNELS: by_channels, DITF: ditf_side}[side]
    match(*inputs(8, (5, 5), (40, 40), 2))
    arguments = inputs(channels, grid, size, count)
    reset_peak_memory()
    before, start = resident_bytes(), time.process_time()
    positions = match(*arguments)
    seconds = time.process_time() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes() - before, "positions": positions}


def inputs(
    channels: int, grid: tuple[int, int], size: tuple[int, int], count: int
) -> tuple[FeatureMap, FeatureMap, np.ndarray]:
    """Make a source map, the same shifted by a cell and noisy as target, and integer points; seeded."""
    rng = np.random.default_rng(0)
    source = rng.standard_normal((channels, *grid), np.float32)
    target = np.roll(source, (1, 1), axis=(1, 2))
    target += 0.5 * rng.standard_normal(target.shape, np.float32)
    cell = (size[0] // grid[0], size[1] // grid[1])
    x = rng.integers(min(2, grid[1] // 4) * cell[1], size[1] - 3 * cell[1] + 1, count)
    y = rng.integers(min(2, grid[0] // 4) * cell[0], size[0] - 3 * cell[0] + 1, count)
    return FeatureMap(source, size), FeatureMap(target, size), np.stack([x, y], axis=1)


def ditf_side(source: FeatureMap, target: FeatureMap, points: np.ndarray) -> np.ndarray:
    """Match as Model.match does on the host."""
    return match_points(source, target, points).points.astype(np.int64)


def published(source: FeatureMap, target: FeatureMap, points: np.ndarray) -> np.ndarray:
    """Upsample, normalise, multiply, argmax; the source is freed once its queries are taken."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        queries = functional.normalize(
            _upsample(source.array, source.image_size)[:, points[:, 1], points[:, 0]], dim=0
        )
        pixels = functional.normalize(_upsample(target.array, target.image_size).flatten(1), dim=0)
        best = (queries.T @ pixels).argmax(dim=1).numpy()
    return np.stack([best % target.image_size[1], best // target.image_size[1]], axis=1)


def by_channels(source: FeatureMap, target: FeatureMap, points: np.ndarray) -> np.ndarray:
    """Match as `published`, with products and squared norms summed over tiles of channels."""
    import torch

    torch.set_num_threads(THREADS)
    height, width = target.image_size
    scores, squared = torch.zeros(len(points), height * width), torch.zeros(height * width)
    with torch.inference_mode():
        for start in range(0, source.channels, TILE):
            part = slice(start, start + TILE)
            queries = _upsample(source.array[part], source.image_size)[:, points[:, 1], points[:, 0]]
            pixels = _upsample(target.array[part], target.image_size).flatten(1)
            scores += queries.T @ pixels
            squared += pixels.square_().sum(dim=0)
        best = (scores / squared.sqrt().clamp(min=1e-12)).argmax(dim=1).numpy()
    return np.stack([best % width, best // width], axis=1)


def _upsample(array: np.ndarray, size: tuple[int, int]) -> Any:
    import torch
    from torch.nn import functional

    return functional.interpolate(torch.from_numpy(array)[None], size, mode="bilinear")[0]


def row_of(case: dict[str, Any]) -> tuple[str, ...]:
    """Format one row of the table."""
    height, width = case["size"]
    ours = case[DITF]
    start = (f"{width}x{height}", str(case["channels"]), str(case["points"]))
    own = f"{ours['seconds'] * 1e3:.0f} ms", bytes_text(ours["peak_bytes"])
    if "peer" not in case:
        needs = f"left out: {bytes_text(case['published_needs_bytes'])}"
        return (*start, needs, "", own[0], "", "", own[1], "", "")
    theirs, ratios = case[case["peer"]], case["ratios"]
    return (
        *start,
        case["peer"],
        f"{theirs['seconds']:.2f} s",
        own[0],
        f"{ratios['seconds']:.0f}x",
        bytes_text(theirs["peak_bytes"]),
        own[1],
        f"{ratios['peak_bytes']:.0f}x",
        f"{case['identical']}/{case['points']}",
    )


if __name__ == "__main__":
    main()
