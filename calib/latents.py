"""Deciding whether two encoders share a latent space, by comparing x_0 on the same images."""

from __future__ import annotations

import numpy as np

RELATIVE_ERROR = 0.7
"""Largest rms error of x_0 over its standard deviation. Predicting each channel's mean gives 1, an unrelated
encoder of the same spread 1.4; at 0.7 half of the variance is explained."""

CORRELATION = 0.3
"""Least correlation of a channel. An unrelated or exchanged channel is near 0 and a negated one below it; the
error over all channels barely shows one such channel among sixteen."""


def x_0_agreement(actual: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Compare x_0 of two encoders, shifted and scaled as the model takes it.

    Args:
        actual, expected: [n, c, h, w], of the same images.

    Returns:
        relative_error, rms(a - e) / rms(e - mean of its channel); correlation_mean and correlation_min over
        channels; cosine over all values; gain, the least-squares factor between them. Values are NaN if a
        channel is constant or a latent is not finite.
    """
    a = actual.astype(np.float64).transpose(1, 0, 2, 3).reshape(actual.shape[1], -1)
    e = expected.astype(np.float64).transpose(1, 0, 2, 3).reshape(expected.shape[1], -1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        a_varying = a - a.mean(axis=1, keepdims=True)
        e_varying = e - e.mean(axis=1, keepdims=True)
        products = (a_varying * e_varying).sum(axis=1)
        squares = (a_varying**2).sum(axis=1), (e_varying**2).sum(axis=1)
        correlation = products / np.sqrt(squares[0] * squares[1])
        return {
            "relative_error": float(np.sqrt(((a - e) ** 2).sum() / squares[1].sum())),
            "correlation_mean": float(correlation.mean()),
            "correlation_min": float(correlation.min()),
            "cosine": float((a * e).sum() / np.sqrt((a * a).sum() * (e * e).sum())),
            "gain": float(products.sum() / squares[1].sum()),
        }


def same_space(agreement: dict[str, float]) -> bool:
    """Whether an encoder with this agreement can replace the other; NaN fails."""
    return agreement["relative_error"] <= RELATIVE_ERROR and agreement["correlation_min"] >= CORRELATION
