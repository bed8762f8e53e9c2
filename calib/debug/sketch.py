"""A tensor in a few hundred numbers: enough to tell, later and elsewhere, whether another is the same.

Over all axes but the last a signed sum, for several seeded patterns of signs; then channels are folded into
buckets. It is linear, so the sketch of a difference is the difference of sketches, and one wrong channel
shows in one bucket of most patterns.
"""

from __future__ import annotations

import numpy as np

BUCKETS = 128
PATTERNS = 4


def sketch(tensor: np.ndarray) -> np.ndarray:
    """Sketch of a tensor of any shape [..., C]: float32 [PATTERNS * min(C, BUCKETS)]."""
    rows = tensor.reshape(-1, tensor.shape[-1]).astype(np.float64)
    signs = np.random.default_rng(len(rows)).choice((-1.0, 1.0), (PATTERNS, len(rows)))
    with np.errstate(invalid="ignore", over="ignore"):  # infinities show as such
        channels = signs @ rows
        count = channels.shape[1]
        padded = np.zeros((PATTERNS, -(-count // BUCKETS) * BUCKETS))
        padded[:, :count] = channels
        buckets: np.ndarray = padded.reshape(PATTERNS, -1, BUCKETS).sum(axis=1)[:, :count]
        return buckets.astype(np.float32).flatten()


def worst_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a bucket or channel, over its own size and the median one's.

    Args:
        actual, expected: [C], sketches, or rms values of channels.

    Returns:
        Infinity where `actual` is not finite, or of another length.
    """
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    size = np.abs(expected.astype(np.float64))
    error = np.abs(actual.astype(np.float64) - expected)
    return float((error / np.maximum(size + np.median(size), 1e-30)).max(initial=0.0))
