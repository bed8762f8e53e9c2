"""Linear sketches: a tensor summarised in a few hundred numbers, to compare it with another one later.

A sketch sums the tensor over all axes but the last with seeded random signs, for several patterns of signs,
and then adds channels up into buckets. It is linear, so the sketch of a difference is the difference of the
sketches, and one wrong channel shows in one bucket of most patterns.
"""

from __future__ import annotations

import numpy as np

BUCKETS = 128
PATTERNS = 4


def sketch(tensor: np.ndarray) -> np.ndarray:
    """Sketch a tensor of any shape [..., C] into float32 [PATTERNS * min(C, BUCKETS)]."""
    rows = tensor.reshape(-1, tensor.shape[-1]).astype(np.float64)
    signs = np.random.default_rng(len(rows)).choice((-1.0, 1.0), (PATTERNS, len(rows)))
    with np.errstate(invalid="ignore", over="ignore"):  # infinities stay infinite
        channels = signs @ rows
        count = channels.shape[1]
        padded = np.zeros((PATTERNS, -(-count // BUCKETS) * BUCKETS))
        padded[:, :count] = channels
        buckets: np.ndarray = padded.reshape(PATTERNS, -1, BUCKETS).sum(axis=1)[:, :count]
        return buckets.astype(np.float32).flatten()


def worst_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest of |actual - expected| / (|expected| + its median) over buckets or channels.

    Args:
        actual, expected: [C], sketches, or rms values of channels.

    Returns:
        The error; infinity if `actual` is not finite or has another length.
    """
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    size = np.abs(expected.astype(np.float64))
    error = np.abs(actual.astype(np.float64) - expected)
    return float((error / np.maximum(size + np.median(size), 1e-30)).max(initial=0.0))
