"""DiTF's published protocol step by step in float64 PyTorch, with which the matcher must agree."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import TIE_TOLERANCE

ROUNDING = 3e-7
"""The error of a cosine by float32 sums over a few hundred channels: a few units in the last place of 1."""


def upsample(features: FeatureMap) -> torch.Tensor:
    """Upsample bilinearly (align_corners=False) over the cells that the image covers; float64 [C, H, W]."""
    height, width = features.image_size
    rows, columns = features.cells
    array = torch.from_numpy(np.asarray(features.array, np.float64))[None]
    if (rows, columns) == array.shape[2:]:
        return functional.interpolate(array, (height, width), mode="bilinear", align_corners=False)[0]
    # A part of a cell more than the image is upsampled with it, then cut off.
    scale = (height / rows, width / columns)
    return functional.interpolate(
        array, scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=False
    )[0, :, :height, :width]


def cosines(source: FeatureMap, target: FeatureMap, points: np.ndarray) -> np.ndarray:
    """Every pixel's cosine, float64 [N, H * W]. A zero vector has the cosine 0 with everything."""
    pixels = upsample(target).flatten(1)
    sources = upsample(source)
    queries = torch.stack([_sample(sources, x, y) for x, y in np.asarray(points, np.float64)])
    pixels = pixels / pixels.norm(dim=0).clamp(min=1e-12)
    queries = queries / queries.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (queries @ pixels).numpy()


def accepted(scores: np.ndarray) -> set[int]:
    """Pixels that the tie rule may pick: one, unless rounding decides which one it is.

    The rule is the first pixel within TIE_TOLERANCE of the maximum. A pixel counts when its own cosine may
    be within the tolerance, and no earlier one is for certain.
    """
    best = scores.max()
    certain = int((scores >= best - TIE_TOLERANCE + ROUNDING).argmax())
    possible = np.flatnonzero(scores[: certain + 1] >= best - TIE_TOLERANCE - ROUNDING)
    return set(possible.tolist())


def _sample(upsampled: torch.Tensor, x: float, y: float) -> torch.Tensor:
    _, height, width = upsampled.shape
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    tx, ty = x - x0, y - y0
    above = (1 - tx) * upsampled[:, y0, x0] + tx * upsampled[:, y0, x1]
    below = (1 - tx) * upsampled[:, y1, x0] + tx * upsampled[:, y1, x1]
    return (1 - ty) * above + ty * below
