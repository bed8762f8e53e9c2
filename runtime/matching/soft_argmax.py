"""Sub-pixel matches by the expectation of a softmax over the target's cells around the best one.

Both methods work on the feature grid, as published; the expected position is then scaled to the image.

`window` is the window soft-argmax of GeoAware-SC (Zhang et al., CVPR 2024; utils/utils_correspondence.py,
`get_flow`). Cosines outside a window around the best cell are multiplied by zero. They keep a logit of 0 and
stay in the softmax, so where the best cosine is low, the whole map influences the result.

`kernel` is the kernel soft-argmax of SFNet (Lee et al., CVPR 2019; model.py, `kernel_soft_argmax`). Cosines
are multiplied by a Gaussian around the best cell. As in GeoAware-SC, SFNet's ReLU before it is left out.
"""

from __future__ import annotations

import math

import numpy as np

from ditf.runtime.errors import InputError
from ditf.runtime.matching.cells import TIE_TOLERANCE

METHODS = ("argmax", "window", "kernel")

WINDOW = 15
"""Side of the window in cells: GeoAware-SC's default, 7 to either side (5 in its zero-shot setting)."""

SIGMA = 5.0
"""Standard deviation of SFNet's kernel, in cells."""

TEMPERATURE = 0.02
"""Softmax temperature of both methods: GeoAware-SC's beta, which equals 1/50 for SFNet's beta of 50."""


def check_method(
    method: str, window: int = WINDOW, temperature: float = TEMPERATURE, sigma: float = SIGMA
) -> None:
    """Check the options of `match_points`.

    Raises:
        InputError: the method is unknown, the window is not odd and positive, or the temperature or sigma is
            not positive and finite.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}", f"choose one of {', '.join(METHODS)}")
    if window < 1 or window % 2 != 1:
        raise InputError(f"a window of {window} cells", "it is an odd number of cells, such as 15")
    for name, value in (("temperature", temperature), ("sigma", sigma)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value:g}", "it is a positive number")


def soft_argmax(
    cosines: np.ndarray, method: str, window: int, temperature: float, sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the expected position of the best match.

    Args:
        cosines: float32 [N, h, w], the cosine of each query with the target's cells. It is overwritten.
        method: "window" or "kernel".
        window: the side of the window in cells; it is cut off at the map's edge.
        temperature: the temperature of the softmax.
        sigma: the standard deviation of the kernel in cells.

    Returns:
        The positions, float32 [N, 2], (x, y) in cells, and the cosine of the best cell, float32 [N].
    """
    count, h, w = cosines.shape
    flat = cosines.reshape(count, h * w)
    top = flat.max(axis=1)
    y, x = np.divmod((flat >= top[:, None] - TIE_TOLERANCE).argmax(axis=1), w)
    rows, columns = (
        np.abs(np.arange(n, dtype=np.float32) - best[:, None]) for n, best in ((h, y), (w, x))
    )  # cells away from the best one, [N, h] and [N, w]
    if method == "window":
        down, across = ((away <= window // 2).astype(np.float32) for away in (rows, columns))
    else:
        down, across = (np.exp(away**2 / np.float32(-2 * sigma**2)) for away in (rows, columns))
    cosines *= down[:, :, None]
    cosines *= across[:, None, :]
    flat -= flat.max(axis=1)[:, None]
    flat /= np.float32(temperature)
    np.exp(flat, out=flat)
    total = flat.sum(axis=1)
    expected = np.stack(
        [
            cosines.sum(axis=1) @ np.arange(w, dtype=np.float32) / total,
            cosines.sum(axis=2) @ np.arange(h, dtype=np.float32) / total,
        ],
        axis=1,
    )
    return expected, top
