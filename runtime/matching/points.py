"""Matching points at full resolution without upsampling a feature map.

By default points are matched as in DiTF's published protocol, which upsamples the target's features to the
image, normalises every pixel and takes the pixel of the highest cosine. Because bilinear upsampling is
linear, <q, up(F)> = up(<q, F>), and |up(F)|^2 at a pixel is a quadratic form in the inner products of the
(at most) four cells around it. These are five small maps, so the upsampled features are never computed.
docs/design.md derives this under "Exact matching".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

import numpy as np

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import TIE_TOLERANCE, TINY_SQUARE, to_pixels, unit_cells
from ditf.runtime.matching.interpolation import sample_rows, upsampling_matrix
from ditf.runtime.matching.norms import inverse_norms
from ditf.runtime.matching.pruning import Pruner
from ditf.runtime.matching.soft_argmax import SIGMA, TEMPERATURE, WINDOW, check_method, soft_argmax

PointsLike = Union[np.ndarray, Sequence[Sequence[float]]]

CHUNK = 64  # points matched at a time, so that memory does not grow with their number
_TILE = 1 << 20  # scores held at a time, float32: 4 MiB, so that a tile stays in cache


@dataclass(frozen=True)
class Matches:
    """Matches of N points.

    Attributes:
        points: float32 [N, 2], (x, y) in the target image's pixels, centres at integers.
        scores: float32 [N], cosine similarity in [-1, 1].
    """

    points: np.ndarray
    scores: np.ndarray


def parse_points(texts: Sequence[str]) -> list[tuple[float, float]]:
    """Parse points written as "x,y".

    Raises:
        InputError: a text does not hold two numbers.
    """
    points = []
    for text in texts:
        try:
            x, y = (float(part) for part in text.split(","))
        except ValueError:
            raise InputError(f"point {text!r:.80} is not x,y", "for example 120,88") from None
        points.append((x, y))
    return points


def check_points(points: PointsLike, image_size: tuple[int, int]) -> np.ndarray:
    """Validate points inside an image of size (H, W).

    Returns:
        float64 [N, 2], (x, y) in pixels.

    Raises:
        InputError: the points have another shape, are not finite numbers, or lie outside the image.
    """
    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError("points must be numbers [N, 2], (x, y) in pixels") from None
    if array.size == 0:
        return array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise InputError(f"points must be [N, 2], (x, y) in pixels, got {list(array.shape)}")
    height, width = image_size
    inside = ((array >= 0) & (array <= (width - 1, height - 1))).all(axis=1)  # False for NaN
    if not inside.all():
        x, y = array[np.flatnonzero(~inside)[0]]
        raise InputError(
            f"point {x:g},{y:g} is outside the source image of {width}x{height} pixels",
            f"x is 0..{width - 1}, y is 0..{height - 1}",
        )
    return array


def interpolation_inputs(
    source: FeatureMap, target: FeatureMap, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute the inputs of match.onnx beside the two maps.

    Args:
        source, target: the two feature maps.
        points: [N, 2], (x, y) in the source image's pixels; already checked.

    Returns:
        Four float32 matrices. point_rows [N, h] and point_columns [N, w] are the weights of the source's
        cells for each point; rows [H, h'] and columns [W, w'] upsample the target to its image.
    """
    (source_rows, source_columns), (target_rows, target_columns) = map(_upsampling, (source, target))
    return (
        sample_rows(source_rows, points[:, 1]),
        sample_rows(source_columns, points[:, 0]),
        target_rows,
        target_columns,
    )


def _upsampling(features: FeatureMap) -> tuple[np.ndarray, np.ndarray]:
    """The matrices that upsample a map to its image: rows [H, h] and columns [W, w]."""
    rows, columns = (
        upsampling_matrix(pixels, cells, extent)
        for pixels, cells, extent in zip(features.image_size, features.grid, features.cells, strict=True)
    )
    return rows, columns


def match_points(
    source: FeatureMap,
    target: FeatureMap,
    points: PointsLike,
    method: str = "argmax",
    window: int = WINDOW,
    temperature: float = TEMPERATURE,
    sigma: float = SIGMA,
) -> Matches:
    """Find each source point in the target.

    A fractional source point samples the upsampled source map bilinearly.

    Args:
        source, target: maps with the same number of channels.
        points: [N, 2], (x, y) in the source image's own pixels.
        method: "argmax" takes the target pixel of the highest cosine; ties go to the first pixel in row-major
            order. "window" and "kernel" find sub-pixel positions (see `soft_argmax`); their score is the
            cosine of the best cell.
        window: the side of the window of "window" in cells, an odd number. It may exceed the map.
        temperature: the softmax temperature of "window" and "kernel".
        sigma: the standard deviation of "kernel" in cells.

    Returns:
        Matches in the target image's own pixels.

    Raises:
        InputError: points or options are bad, or the maps are of different models.
    """
    return PointMatcher(source, target, method, window, temperature, sigma)(points)


class PointMatcher:
    """Matches points as `match_points` does, over several calls.

    What depends on the target alone is computed once, when the matcher is made.

    Args:
        source, target, method, window, temperature, sigma: see `match_points`.

    Raises:
        InputError: an option is bad, or the maps are of different models.
    """

    def __init__(
        self,
        source: FeatureMap,
        target: FeatureMap,
        method: str = "argmax",
        window: int = WINDOW,
        temperature: float = TEMPERATURE,
        sigma: float = SIGMA,
    ) -> None:
        check_method(method, window, temperature, sigma)
        check_channels(source, target)
        self._source, self._target, self._method = source, target, method
        self._soft = (window, temperature, sigma)
        self._source_rows, self._source_columns = _upsampling(source)
        if method != "argmax":
            self._cells = unit_cells(target).T
            return
        self._rows, self._columns = _upsampling(target)
        self._inverse_norm = inverse_norms(target.array, self._rows, self._columns)
        self._pruner = Pruner(self._inverse_norm, self._rows, self._columns)
        self._cells = target.array.reshape(len(target.array), -1).astype(np.float32)

    def __call__(self, points: PointsLike) -> Matches:
        """Match points [N, 2], (x, y) in the source image's own pixels.

        Raises:
            InputError: the points are bad.
        """
        checked = check_points(points, self._source.image_size)
        found = np.zeros((len(checked), 2), np.float32)
        scores = np.zeros(len(checked), np.float32)
        for start in range(0, len(checked), CHUNK):
            chunk = slice(start, start + CHUNK)
            found[chunk], scores[chunk] = self._chunk(checked[chunk])
        return Matches(found, np.clip(scores, -1.0, 1.0))

    def _chunk(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        queries = _sample(
            self._source.array,
            sample_rows(self._source_rows, points[:, 1]),
            sample_rows(self._source_columns, points[:, 0]),
        )
        inner = (queries @ self._cells).reshape(-1, *self._target.array.shape[1:])
        if self._method != "argmax":
            expected, scores = soft_argmax(inner, self._method, *self._soft)
            return to_pixels(expected, self._target), scores
        best, scores = _pruned_argmax(self._pruner, inner, self._inverse_norm, self._rows, self._columns)
        y, x = np.divmod(best, self._target.image_size[1])
        return np.stack([x, y], axis=1), scores


def heat_map(source: FeatureMap, target: FeatureMap, point: Sequence[float] | np.ndarray) -> np.ndarray:
    """Compute the cosine of one source point with every target pixel, exactly at full resolution.

    Args:
        source, target: maps with the same number of channels.
        point: (x, y) in the source image's own pixels.

    Returns:
        float32 [H, W] at the target image's size, in [-1, 1]. `match_points` finds the point at its maximum.

    Raises:
        InputError: the point is bad, or the maps are of different models.
    """
    check_channels(source, target)
    checked = check_points(np.asarray(point)[None], source.image_size)
    point_rows, point_columns, rows, columns = interpolation_inputs(source, target, checked)
    query = _sample(source.array, point_rows, point_columns)
    cells = target.array.reshape(len(target.array), -1).astype(np.float32)
    inner = (query @ cells).reshape(target.array.shape[1:])
    scores = _tile_scores(inner @ columns.T, inverse_norms(target.array, rows, columns), rows, slice(None))
    return np.clip(scores, -1.0, 1.0, out=scores)


def check_channels(source: FeatureMap, target: FeatureMap) -> None:
    """Check that two maps have the same number of channels.

    Raises:
        InputError: they do not.
    """
    if source.channels != target.channels:
        raise InputError(
            f"the maps have {source.channels} and {target.channels} channels",
            "compute both with the same bundle",
        )


def _sample(array: np.ndarray, point_rows: np.ndarray, point_columns: np.ndarray) -> np.ndarray:
    """The map's unit vectors [N, C] at points that are given by their cell weights."""
    channels, h, w = array.shape
    weights = (point_rows[:, :, None] * point_columns[:, None, :]).reshape(-1, h * w)
    queries = weights @ array.reshape(channels, h * w).astype(np.float32).T
    squared = np.einsum("nc,nc->n", queries, queries)
    return queries / np.sqrt(np.maximum(squared, TINY_SQUARE))[:, None]


def _pruned_argmax(
    pruner: Pruner, inner: np.ndarray, inverse_norm: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`_argmax` of inner products [N, h, w], over only those pixels that can be the best if they are few."""
    best = np.zeros(len(inner), np.int64)
    top = np.zeros(len(inner), np.float32)
    possible, crowded = pruner.candidates(inner)
    few = ~crowded
    if few.any():
        best[few], top[few] = pruner.best(inner[few], possible[few])
    if crowded.any():
        best[crowded], top[crowded] = _argmax(inner[crowded] @ columns.T, inverse_norm, rows)
    return best, top


def _argmax(
    similarity: np.ndarray, inverse_norm: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each query, the first pixel within the tie tolerance of the best cosine, and the best cosine.

    Only the scores of one tile of image rows of one query are in memory at a time.
    """
    height, width = inverse_norm.shape
    step = max(1, _TILE // width)
    tiles = [slice(y, y + step) for y in range(0, height, step)]
    best = np.zeros(len(similarity), np.int64)
    top = np.zeros(len(similarity), np.float32)
    for n, query in enumerate(similarity):
        maxima, firsts = [], []
        for tile in tiles:
            scores = _tile_scores(query, inverse_norm, rows, tile)
            maxima.append(scores.max())
            firsts.append(_first_at(scores, maxima[-1]))
        top[n] = max(maxima)
        winner = next(i for i, maximum in enumerate(maxima) if maximum >= top[n] - TIE_TOLERANCE)
        if maxima[winner] < top[n]:  # an earlier tile ties with the best one
            scores = _tile_scores(query, inverse_norm, rows, tiles[winner])
            firsts[winner] = _first_at(scores, top[n])
        best[n] = tiles[winner].start * width + firsts[winner]
    return best, top


def _tile_scores(query: np.ndarray, inverse_norm: np.ndarray, rows: np.ndarray, tile: slice) -> np.ndarray:
    scores: np.ndarray = rows[tile] @ query
    scores *= inverse_norm[tile]
    return scores


def _first_at(scores: np.ndarray, maximum: np.floating) -> int:
    return int((scores >= maximum - TIE_TOLERANCE).argmax())
