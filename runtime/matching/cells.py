"""The cells of a feature map: their unit vectors, and where they lie on the image."""

from __future__ import annotations

import numpy as np

from ditf.runtime.features import FeatureMap

TINY_SQUARE = 1e-24
"""A lower bound for squared norms. It gives a zero vector the cosine 0 with everything."""

TIE_TOLERANCE = np.float32(1e-6)
"""Cosines within this distance of the maximum count as equal, and the first of them in row-major order wins.
float32 cannot tell them apart, and so every backend answers with the same pixel."""


def unit_cells(features: FeatureMap) -> np.ndarray:
    """Every cell's feature as a unit vector, float32 [h * w, C] in row-major order. Zero vectors stay zero.

    The result is a copy and takes 4 bytes per element of the map.
    """
    cells = features.array.reshape(features.channels, -1).T.astype(np.float32, order="C")
    squared = np.einsum("nc,nc->n", cells, cells, dtype=np.float64)
    cells /= np.sqrt(np.maximum(squared, TINY_SQUARE)).astype(np.float32)[:, None]
    return cells


def cell_side(features: FeatureMap) -> float:
    """The longer side of a cell on the image, in pixels."""
    return max(pixels / cells for pixels, cells in zip(features.image_size, features.cells, strict=True))


def to_pixels(cells: np.ndarray, features: FeatureMap) -> np.ndarray:
    """Convert positions on a map to pixels of its image.

    A cell is a rectangle of the image with its centre at ((x + 0.5) * W / w - 0.5, (y + 0.5) * H / h - 0.5),
    where pixel centres are at integers. Bilinear upsampling with align_corners=False assumes the same. For a
    padded image, w and h are the cells that the image covers; centres beyond its edge are moved onto it.

    Args:
        cells: [N, 2], (x, y) in cells; (0, 0) is the centre of the first cell.

    Returns:
        float64 [N, 2], (x, y) in pixels, inside the image.
    """
    size = np.array(features.image_size[::-1], np.float64)
    pixels: np.ndarray = np.clip((cells + 0.5) * (size / features.cells[::-1]) - 0.5, 0.0, size - 1.0)
    return pixels


def cell_centres(features: FeatureMap) -> np.ndarray:
    """The centres of all cells, float64 [h * w, 2], (x, y) in pixels of the image, in row-major order."""
    y, x = np.indices(features.grid)
    return to_pixels(np.stack([x.ravel(), y.ravel()], axis=1), features)
