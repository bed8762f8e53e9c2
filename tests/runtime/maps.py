"""Feature maps for matching tests: random ones, smooth ones, and pairs with known matches."""

from __future__ import annotations

import numpy as np

from ditf.runtime.features import FeatureMap


def random_map(
    seed: int, shape: tuple[int, int, int], size: tuple[int, int], dtype: type = np.float32
) -> FeatureMap:
    """A map of normal noise; `size` is the image's (H, W)."""
    return FeatureMap(np.random.default_rng(seed).standard_normal(shape).astype(dtype), size)


def translated_pair(
    seed: int, channels: int, grid: tuple[int, int], shift: tuple[int, int], cell: int = 8
) -> tuple[FeatureMap, FeatureMap]:
    """Two views of one plane of features, the second `shift` cells (x, y) to the right and down.

    Noise, smoothed over three cells: neighbours resemble each other, no two cells are equal. What is at
    (x, y) px of the first is at (x, y) + cell * shift of the second.
    """
    h, w = grid
    margin_y, margin_x = abs(shift[1]), abs(shift[0])
    plane = np.random.default_rng(seed).standard_normal((channels, h + margin_y + 2, w + margin_x + 2))
    plane = plane[:, :-1] + plane[:, 1:]
    plane = plane[:, :-1] + plane[:, 1:]
    plane = plane[:, :, :-1] + plane[:, :, 1:]
    plane = (plane[:, :, :-1] + plane[:, :, 1:]).astype(np.float32)
    y, x = max(shift[1], 0), max(shift[0], 0)
    first = plane[:, y : y + h, x : x + w]
    second = plane[:, y - shift[1] : y - shift[1] + h, x - shift[0] : x - shift[0] + w]
    size = (h * cell, w * cell)
    return FeatureMap(first.copy(), size), FeatureMap(second.copy(), size)
