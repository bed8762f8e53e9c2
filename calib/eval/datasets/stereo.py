"""scikit-image's stereo motorcycle (Middlebury 2014, Scharstein et al.): photographs with known disparity.

The pair is part of the scikit-image wheel, so nothing is fetched. Pixel (x, y) of the left image is at
(x - disparity, y) in the right one. The points are every 16th pixel of the left image, from the eighth on,
whose disparity is known and whose truth is in view. Middlebury's mask of pixels that the right camera does
not see is not in the wheel; a hidden point therefore counts as wrong unless its neighbourhood is found.

Metrics: mean end-point error in pixels; the share within 1, 3 and 5 px; PCK at alpha of the image's longer
side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditf.calib.eval.datasets.base import Pair, Reading
from ditf.runtime.errors import missing_extra

SPLITS = ("test",)
STEP = 16  # px


def read_stereo(data: Path | None, split: str) -> Reading:
    """Read the only pair.

    Raises:
        MissingComponent: scikit-image is not installed.
    """
    try:
        import skimage.data
    except ImportError:
        raise missing_extra("scikit-image", "eval") from None
    left, right, disparity = skimage.data.stereo_motorcycle()
    height, width = disparity.shape
    y, x = (axis.ravel() for axis in np.mgrid[STEP // 2 : height : STEP, STEP // 2 : width : STEP])
    points = np.stack([x, y], axis=1).astype(np.float64)
    truth = np.stack([x - disparity[y, x].astype(np.float64), y], axis=1)
    known = np.isfinite(truth).all(axis=1) & (truth[:, 0] >= 0)
    pair = Pair(
        name="motorcycle",
        source=left,
        target=right,
        points=points[known],
        truth=truth[known],
        box=(0.0, 0.0, float(width), float(height)),
        category="motorcycle",
        keypoints=[""] * int(known.sum()),
    )
    return Reading([pair])
