"""Finding the best pixels by bounds: exact scores are computed only where the best pixel can be.

A quad is the rectangle between four neighbouring cell centres. In it the upsampled inner product is a
weighted average of the four corners, so no cosine there exceeds the largest corner times the largest 1 /
|up(F)| (or the smallest, if the corner is negative). A quad whose bound is below a cosine that is reached
elsewhere is skipped. Nothing is approximated: the remaining quads hold the best pixel and every pixel that
ties with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditf.runtime.matching.cells import TIE_TOLERANCE

_TILE = 1 << 18  # scores held at a time, float32: 1 MiB
_SLACK = np.float32(3e-6)  # the tie tolerance plus the float32 error of a bound
_CROWDED = 1 / 8  # with a larger share of quads than this, computing whole rows is cheaper


@dataclass(frozen=True)
class _Axis:
    """The pixels of each interval between two cell centres along one axis; the last of the n is half open.

    Attributes:
        pixels: int64 [n, p], the pixels of each interval, padded by repeating the last one.
        weights: float32 [n, p, 2], the weights of the interval's cell and of the next cell.
        starts: the first pixel of each interval that has pixels.
        filled: bool [n], whether an interval has pixels.
        probes: int64 [n], a pixel on which the cell has its largest weight.
    """

    pixels: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    filled: np.ndarray
    probes: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray) -> _Axis:
        """The intervals of an upsampling matrix [pixels, n]."""
        count, cells = matrix.shape
        lower = (matrix > 0).argmax(axis=1)
        starts, stops = (np.searchsorted(lower, np.arange(cells), side) for side in ("left", "right"))
        filled = stops > starts
        widest = int((stops - starts).max())
        last = np.clip(stops - 1, 0, count - 1)[:, None]
        pixels = np.minimum(starts[:, None] + np.arange(widest), last)
        padded = np.pad(matrix, ((0, 0), (0, 1)))
        cell = np.arange(cells)[:, None]
        weights = np.stack([padded[pixels, cell], padded[pixels, cell + 1]], axis=2)
        return cls(pixels, weights, starts[filled], filled, matrix.argmax(axis=0))


class Pruner:
    """Finds the best pixels of queries in one target.

    Args:
        inverse_norm: float32 [H, W], 1 / |up(F)|.
        rows [H, h], columns [W, w]: the matrices that upsample the target to its image.
    """

    def __init__(self, inverse_norm: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        self._inverse_norm = inverse_norm
        self._rows, self._columns = _Axis.of(rows), _Axis.of(columns)
        self._probe_rows = rows[self._rows.probes]
        self._probe_columns = columns[self._columns.probes].T.copy()
        self._probe_norm = inverse_norm[np.ix_(self._rows.probes, self._columns.probes)]
        self._largest, self._smallest = self._over_quads(np.maximum), self._over_quads(np.minimum)
        self._empty = ~(self._rows.filled[:, None] & self._columns.filled)

    def _over_quads(self, reduce: np.ufunc) -> np.ndarray:
        """The largest or smallest inverse norm in each quad, [h, w]; 0 for a quad without pixels."""
        found = np.zeros((len(self._rows.filled), len(self._columns.filled)), np.float32)
        tops = reduce.reduceat(self._inverse_norm, self._rows.starts, axis=0)
        found[np.ix_(self._rows.filled, self._columns.filled)] = reduce.reduceat(
            tops, self._columns.starts, axis=1
        )
        return found

    def candidates(self, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the quads that may hold the best pixel or one that ties with it.

        Args:
            inner: float32 [N, h, w], inner products of unit queries with the target's cells.

        Returns:
            bool [N, h, w], whether a quad may hold it; and bool [N], whether a query has so many such quads
            that computing all pixels is cheaper.
        """
        probes = (self._probe_rows @ inner @ self._probe_columns) * self._probe_norm
        reached = probes.max(axis=(1, 2))
        corner = inner.copy()
        np.maximum(corner[:, :-1], inner[:, 1:], out=corner[:, :-1])
        corner[:, :, :-1] = np.maximum(corner[:, :, :-1], corner[:, :, 1:])
        bound = corner * np.where(corner > 0, self._largest, self._smallest)
        bound[:, self._empty] = -np.inf
        possible = bound >= (reached - _SLACK)[:, None, None]
        return possible, possible.mean(axis=(1, 2)) > _CROWDED

    def best(self, inner: np.ndarray, possible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each query, the first pixel within the tie tolerance of the best cosine, and the best cosine.

        Args:
            inner: float32 [N, h, w], as in `candidates`.
            possible: bool [N, h, w], the result of `candidates`.
        """
        query, row, column = np.nonzero(possible)
        firsts = np.searchsorted(query, np.arange(len(inner)))
        tops = np.empty(len(query), np.float32)
        block = max(1, _TILE // (self._rows.pixels.shape[1] * self._columns.pixels.shape[1]))
        for start in range(0, len(query), block):
            part = slice(start, start + block)
            tops[part] = self._scores(inner, query[part], row[part], column[part]).max(axis=(1, 2))
        top = np.maximum.reduceat(tops, firsts)
        lowest = top - TIE_TOLERANCE
        ties = np.flatnonzero(tops >= lowest[query])
        width = self._inverse_norm.shape[1]
        pixels = np.empty(len(ties), np.int64)
        for start in range(0, len(ties), block):
            some = ties[start : start + block]
            which = query[some], row[some], column[some]
            index = (
                self._rows.pixels[row[some]][:, :, None] * width + self._columns.pixels[column[some]][:, None]
            )
            level = self._scores(inner, *which) >= lowest[query[some]][:, None, None]
            pixels[start : start + block] = np.where(level, index, self._inverse_norm.size).min(axis=(1, 2))
        best = np.minimum.reduceat(pixels, np.searchsorted(query[ties], np.arange(len(inner))))
        return best, top

    def _scores(
        self, inner: np.ndarray, query: np.ndarray, row: np.ndarray, column: np.ndarray
    ) -> np.ndarray:
        """Compute the cosines of every pixel of K quads, float32 [K, p, q]; padding repeats a pixel."""
        below = np.minimum(row + 1, inner.shape[1] - 1)
        right = np.minimum(column + 1, inner.shape[2] - 1)
        across = self._columns.weights[column]
        upper, lower = (
            inner[query, line, column, None] * across[:, :, 0]
            + inner[query, line, right, None] * across[:, :, 1]
            for line in (row, below)
        )
        down = self._rows.weights[row]
        scores: np.ndarray = down[:, :, 0, None] * upper[:, None] + down[:, :, 1, None] * lower[:, None]
        scores *= self._inverse_norm[
            self._rows.pixels[row][:, :, None], self._columns.pixels[column][:, None, :]
        ]
        return scores
