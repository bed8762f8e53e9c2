"""Bilinear interpolation as matrices: everything the matcher does to a map is a matrix product."""

from __future__ import annotations

import numpy as np


def upsampling_matrix(pixels: int, cells: int, extent: float | None = None) -> np.ndarray:
    """Bilinear upsampling of one axis, align_corners=False, edges replicated.

    Equal to torch.nn.functional.interpolate(mode="bilinear", align_corners=False, antialias=False)
    along that axis when `extent` is `cells`.

    Args:
        pixels: length of the output axis.
        cells: length of the input axis.
        extent: cells that the output covers, 0 < extent <= cells; `cells` by default.

    Returns:
        float32 [pixels, cells]; a row has at most two neighbouring non-zeros, which sum to 1.
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
    """Rows of an upsampling matrix at fractional pixel positions, interpolated linearly.

    Args:
        matrix: [pixels, cells].
        positions: [N] in 0..pixels-1; pixel centres are at integers.

    Returns:
        float32 [N, cells].
    """
    lower = np.floor(positions).astype(np.int64)
    upper = np.minimum(lower + 1, len(matrix) - 1)
    weight = (positions - lower).astype(np.float32)[:, None]
    return matrix[lower] * (1.0 - weight) + matrix[upper] * weight


def quadratic_matrix(matrix: np.ndarray) -> np.ndarray:
    """Squared and cross weights of an upsampling matrix: what the squared norm of its output needs.

    Args:
        matrix: [pixels, cells].

    Returns:
        float64 [pixels, 2 * cells]: w_i^2, then w_i * w_{i+1}.
    """
    weights = matrix.astype(np.float64)
    following = np.zeros_like(weights)
    following[:, :-1] = weights[:, 1:]
    return np.concatenate([weights * weights, weights * following], axis=1)
