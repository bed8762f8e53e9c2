"""Bilinear interpolation as matrices, so that upsampling a map is a pair of matrix products."""

from __future__ import annotations

import numpy as np


def upsampling_matrix(pixels: int, cells: int, extent: float | None = None) -> np.ndarray:
    """The matrix of bilinear upsampling along one axis, with align_corners=False and replicated edges.

    If `extent` is `cells`, it equals torch.nn.functional.interpolate(mode="bilinear", align_corners=False,
    antialias=False) along that axis.

    Args:
        pixels: the length of the output axis.
        cells: the length of the input axis.
        extent: the number of cells that the output covers, 0 < extent <= cells; `cells` by default.

    Returns:
        float32 [pixels, cells]. A row has at most two non-zeros; they are neighbours and sum to 1.
    """
    span = float(cells if extent is None else extent)
    position = (np.arange(pixels) + 0.5) * (span / pixels) - 0.5
    position = np.clip(position, 0.0, cells - 1.0)
    lower = np.minimum(position.astype(np.int64), cells - 1)
    upper = np.minimum(lower + 1, cells - 1)
    weight = position - lower
    matrix = np.zeros((pixels, cells), np.float32)
    rows = np.arange(pixels)
    matrix[rows, lower] = 1.0 - weight
    matrix[rows, upper] += weight
    return matrix


def sample_rows(matrix: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Interpolate the rows of an upsampling matrix linearly at fractional pixel positions.

    Args:
        matrix: [pixels, cells].
        positions: [N], in 0..pixels-1; pixel centres are at integers.

    Returns:
        float32 [N, cells].
    """
    lower = np.floor(positions).astype(np.int64)
    upper = np.minimum(lower + 1, len(matrix) - 1)
    weight = (positions - lower).astype(np.float32)[:, None]
    return matrix[lower] * (1.0 - weight) + matrix[upper] * weight


def quadratic_matrix(matrix: np.ndarray) -> np.ndarray:
    """The squared and cross weights of an upsampling matrix, from which squared norms of its output follow.

    Args:
        matrix: [pixels, cells].

    Returns:
        float64 [pixels, 2 * cells]: first w_i^2, then w_i * w_{i+1}.
    """
    weights = matrix.astype(np.float64)
    following = np.zeros_like(weights)
    following[:, :-1] = weights[:, 1:]
    return np.concatenate([weights * weights, weights * following], axis=1)
