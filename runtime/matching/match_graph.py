"""Running match.onnx, which matches points as `ditf.runtime.matching.points` does, where the features are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ditf.runtime.backends import Session
from ditf.runtime.backends.engine_records import MATCH_PLAN_POINTS
from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap, not_finite
from ditf.runtime.matching.points import (
    Matches,
    PointsLike,
    check_channels,
    check_points,
    interpolation_inputs,
)


def run_match_graph(
    session: Session, grid: tuple[int, int], source: FeatureMap, target: FeatureMap, points: PointsLike
) -> Matches:
    """Match points with a bundle's match.onnx.

    Args:
        session: an open session of match.onnx.
        grid: the size (h, w) of the bundle's features. Maps of padded images are smaller; they are filled up
            with cells that have no weight.
        source, target: maps of that bundle.
        points: [N, 2], (x, y) in pixels of the source image.

    Raises:
        InputError: the points are bad, or the maps are not of this bundle.
    """
    check_channels(source, target)
    checked = check_points(points, source.image_size)
    point_rows, point_columns, rows, columns = interpolation_inputs(source, target, checked)
    fixed = {
        "source": _whole(source, grid),
        "target": _whole(target, grid),
        "rows": _widen(rows, grid[0]),
        "columns": _widen(columns, grid[1]),
    }
    point_rows, point_columns = _widen(point_rows, grid[0]), _widen(point_columns, grid[1])
    found, scores = [np.zeros((0, 2), np.float32)], [np.zeros(0, np.float32)]
    step = MATCH_PLAN_POINTS[-1]
    for start in range(0, len(checked), step):
        chunk = slice(start, start + step)
        count = len(checked[chunk])
        # An engine compiles kernels and keeps a context for each shape, so it always gets a whole chunk.
        size = step if session.batches else count
        output = session.run(
            {
                **fixed,
                "point_rows": _repeat(point_rows[chunk], size),
                "point_columns": _repeat(point_columns[chunk], size),
            }
        )
        if not np.isfinite(output["scores"]).all():  # the first look at maps in device memory
            raise not_finite()
        found.append(output["points"][:count])
        scores.append(output["scores"][:count])
    return Matches(np.concatenate(found), np.concatenate(scores))


def _whole(features: FeatureMap, grid: tuple[int, int]) -> Any:
    """A map at the graph's size, [1, C, h, w]; it stays in device memory if it is there at that size."""
    resident = features.resident
    if resident is not None and resident.shape[1:] == grid:
        return resident.reshape(1, *resident.shape)
    return _fill(features.array, grid)[None]


def _fill(array: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Extend a map to the graph's size by repeating its edge."""
    missing = (grid[0] - array.shape[1], grid[1] - array.shape[2])
    if min(missing) < 0:
        raise InputError(
            f"a map of {array.shape[1]}x{array.shape[2]} cells does not fit a graph of {grid[0]}x{grid[1]}",
            "compute it with this bundle",
        )
    return np.pad(array, ((0, 0), (0, missing[0]), (0, missing[1])), mode="edge")


def _repeat(rows: np.ndarray, size: int) -> np.ndarray:
    """Fill up to `size` rows by repeating the last one."""
    return np.pad(rows, ((0, size - len(rows)), (0, 0)), mode="edge")


def _widen(matrix: np.ndarray, cells: int) -> np.ndarray:
    """Extend weights to `cells` cells; the cells that were filled up get the weight 0."""
    return np.pad(matrix, ((0, 0), (0, cells - matrix.shape[1])))
