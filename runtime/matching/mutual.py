"""Mutual nearest neighbours, which are matches that hold in both directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import cell_centres, cell_side, unit_cells
from ditf.runtime.matching.points import PointsLike, check_channels, match_points
from ditf.runtime.matching.soft_argmax import check_method

_TILE = 1 << 20  # cosines held at a time, float32: 4 MiB
_STEPS = np.float32(
    1 << 20
)  # cosines are compared as multiples of 2^-20: what float32 cannot tell apart ties


@dataclass(frozen=True)
class MutualMatches:
    """N matches that hold in both directions, sorted by falling score.

    Attributes:
        source_points: float32 [N, 2], (x, y) in the source image's pixels, centres at integers.
        points: float32 [N, 2], the same in the target image.
        scores: float32 [N], cosine similarity in [-1, 1].
    """

    source_points: np.ndarray
    points: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def mutual_matches(
    source: FeatureMap,
    target: FeatureMap,
    max_matches: int | None = None,
    ratio: float | None = None,
    step: int | None = None,
    refine: str | None = None,
) -> MutualMatches:
    """Find the dense mutual nearest neighbours of two feature grids.

    Cells i and j match if j has the highest cosine with i of all target cells, and i the highest with j of
    all source cells. Of equal cosines the first in row-major order counts. Points are the centres of the
    cells in pixels (see `cells`). Swapping source and target gives the same matches, unless `step` is
    given.

    This takes a float32 copy of each map, and 4 MiB.

    Args:
        source, target: maps with the same number of channels.
        max_matches: keep only this many matches, those with the highest scores.
        ratio: Lowe's ratio test, in (0, 1], applied in both directions: the distance of the unit vectors to
            the best cell must be below `ratio` times the distance to the second best (Lowe, IJCV 2004). The
            eight neighbours of the best cell do not count as second, because on a dense grid they always
            resemble it.
        step: match only the source cells of every `step`-th row and column, at 1 / step^2 of the work.
        refine: a method of `match_points`, such as "window", that places the target's points; None places
            them at cell centres. Whatever is fitted to cell centres alone is drawn to the grid. With a
            method, swapping source and target gives the same pairs of cells, but not of points.

    Raises:
        InputError: the maps are of different models, or an option is out of its range.
    """
    check_channels(source, target)
    check_options(max_matches, ratio, step)
    if refine is not None:
        check_method(refine)
    sources, targets = unit_cells(source), unit_cells(target)
    h, w = source.grid
    first = 0 if step is None else min(step // 2, h - 1, w - 1)
    asked = np.arange(h * w).reshape(h, w)[first::step, first::step].ravel()
    there, scores, distinct = _nearest(sources[asked], targets, target.grid, ratio)
    candidates, which = np.unique(there, return_inverse=True)
    back, _, distinct_back = _nearest(targets[candidates], sources, source.grid, ratio)
    kept = np.flatnonzero((back[which] == asked) & distinct & distinct_back[which])
    kept = kept[np.argsort(-scores[kept], kind="stable")][:max_matches]
    points = cell_centres(source)[asked[kept]]
    if refine is None:
        found = cell_centres(target)[there[kept]].astype(np.float32)
    else:
        found = match_points(source, target, points, refine).points
    return MutualMatches(points.astype(np.float32), found, scores[kept])


def mutual_points(
    source: FeatureMap,
    target: FeatureMap,
    points: PointsLike,
    tolerance: float | None = None,
    method: str = "argmax",
    max_matches: int | None = None,
) -> MutualMatches:
    """Match points to the target and back, and keep those that return to where they started.

    Args:
        source, target: maps with the same number of channels.
        points: [N, 2], (x, y) in the source image's own pixels.
        tolerance: the distance in source pixels within which a point must return; the default is the longer
            side of a cell.
        method: as in `match_points`, for both directions.
        max_matches: keep only this many matches, those with the highest scores.

    Raises:
        InputError: as `match_points`, or the tolerance is negative.
    """
    check_options(max_matches)
    if tolerance is None:
        tolerance = cell_side(source)
    if not tolerance >= 0:
        raise InputError(f"tolerance is {tolerance:g} px", "it is 0 or more")
    there = match_points(source, target, points, method)
    given = np.asarray(points, np.float64).reshape(-1, 2)
    back = match_points(target, source, there.points, method)
    kept = np.flatnonzero(np.linalg.norm(back.points - given, axis=1) <= tolerance)
    kept = kept[np.argsort(-there.scores[kept], kind="stable")][:max_matches]
    return MutualMatches(given[kept].astype(np.float32), there.points[kept], there.scores[kept])


def check_options(
    max_matches: int | None = None, ratio: float | None = None, step: int | None = None
) -> None:
    """Check options of `mutual_matches`.

    Raises:
        InputError: an option is out of its range.
    """
    if ratio is not None and not 0 < ratio <= 1:
        raise InputError(f"ratio is {ratio:g}", "it lies in (0, 1], for example 0.9")
    for name, value in (("max_matches", max_matches), ("step", step)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}", "it is 1 or more")


def _nearest(
    queries: np.ndarray, keys: np.ndarray, grid: tuple[int, int], ratio: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the best key of every query.

    Args:
        queries: unit vectors, float32 [n, C].
        keys: unit vectors, float32 [h * w, C].
        grid: (h, w) of the keys.
        ratio: the ratio of Lowe's test; None for no test.

    Returns:
        The index of the key, int64 [n]; its cosine, float32 [n]; whether it passes the test, bool [n].
    """
    h, w = grid
    best = np.zeros(len(queries), np.int64)
    scores = np.zeros(len(queries), np.float32)
    distinct = np.ones(len(queries), bool)
    block = max(1, _TILE // len(keys))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        cosines = queries[part] @ keys.T
        cosines *= _STEPS
        np.rint(cosines, out=cosines)
        best[part] = cosines.argmax(axis=1)
        rows = np.arange(len(cosines))
        scores[part] = np.clip(cosines[rows, best[part]] / _STEPS, -1.0, 1.0)
        if ratio is not None:
            padded = np.full((len(cosines), h + 2, w + 2), -np.inf, np.float32)
            padded[:, 1:-1, 1:-1] = cosines.reshape(-1, h, w)
            y, x = np.divmod(best[part], w)
            for down in range(3):
                for right in range(3):
                    padded[rows, y + down, x + right] = -np.inf
            second = np.minimum(padded.max(axis=(1, 2)) / _STEPS, 1.0)
            # |a - b|^2 = 2 - 2 <a, b>; with no second cell, -inf, any ratio is passed
            distinct[part] = 1.0 - scores[part] < ratio**2 * (1.0 - second)
    return best, scores, distinct
