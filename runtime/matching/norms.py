"""The factors 1 / |up(F)| that normalise every pixel of an upsampled map, computed without upsampling it."""

from __future__ import annotations

import numpy as np

from ditf.runtime.matching.cells import TINY_SQUARE
from ditf.runtime.matching.interpolation import quadratic_matrix

_TILE = 1 << 17  # pixels computed at a time, float64: 1 MiB


def inverse_norms(array: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Compute 1 / |up(F)| at every pixel, float32 [H, W].

    The computation is in float64. Where neighbouring cells point away from each other the terms of the
    quadratic form cancel, and in float32 only noise would be left.

    Args:
        array: the map F, [C, h, w].
        rows [H, h], columns [W, w]: the upsampling matrices of its two axes.
    """
    left, right = quadratic_matrix(rows) @ _norm_kernel(array), quadratic_matrix(columns).T
    inverse = np.empty((len(rows), len(columns)), np.float32)
    step = max(1, _TILE // len(columns))
    for y in range(0, len(rows), step):  # 32 megapixels of float64 would take a gigabyte
        squared = left[y : y + step] @ right
        inverse[y : y + step] = 1.0 / np.sqrt(np.maximum(squared, TINY_SQUARE))
    return inverse


def _norm_kernel(array: np.ndarray) -> np.ndarray:
    """The inner products of neighbouring cells, float64 [2h, 2w], laid out for `quadratic_matrix`.

    Neighbours are found by offsets in the flattened map. At the right and lower edge an offset leads to some
    other cell, whose weight is zero.
    """
    channels, h, w = array.shape
    cells = np.ascontiguousarray(array.reshape(channels, h * w).T, dtype=np.float64)

    def inner(first: int, second: int) -> np.ndarray:
        """The inner product <cell + first, cell + second> of every cell; 0 beyond the last cell."""
        product = np.zeros(h * w)
        count = max(0, h * w - max(first, second))
        np.einsum(
            "nc,nc->n",
            cells[first : first + count],
            cells[second : second + count],
            out=product[:count],
        )
        return product.reshape(h, w)

    here, right, below = 0, 1, w
    diagonals = inner(here, below + right) + inner(right, below)
    return np.block(
        [
            [inner(here, here), 2.0 * inner(here, right)],
            [2.0 * inner(here, below), 2.0 * diagonals],
        ]
    )
