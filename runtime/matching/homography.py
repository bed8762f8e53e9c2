"""Estimating the homography between two images from their matches. It needs OpenCV (extra `eval`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ditf.runtime.errors import InputError, missing_extra
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import cell_side

HOMOGRAPHY_METHODS = ("usac", "ransac", "lmeds")

_FEWEST = 4


@dataclass(frozen=True)
class Homography:
    """A homography and the matches that agree with it.

    Attributes:
        matrix: float64 [3, 3], which takes source pixels (x, y, 1) to target pixels; its last entry is 1.
        inliers: bool [N], the matches that agree with it.
        error_px: the mean distance in target pixels between the inliers and their projected source points.
    """

    matrix: np.ndarray
    inliers: np.ndarray
    error_px: float


def find_homography(
    source_points: np.ndarray, points: np.ndarray, threshold: float = 3.0, method: str = "usac"
) -> Homography:
    """Find the homography that most matches agree with, by OpenCV's findHomography.

    The same input always gives the same result.

    Args:
        source_points, points: [N, 2], (x, y) in pixels of the source and of the target.
        threshold: the distance in target pixels up to which a match is an inlier; "lmeds" finds its own. For
            matches of cells use `cell_threshold`, because below half a cell most matches agree with the grid
            itself.
        method: "usac" (MAGSAC++, Barath et al., CVPR 2020), "ransac", or "lmeds" (more than half of the
            matches must be right).

    Raises:
        InputError: there are fewer than four matches, no homography has more inliers than the four that it is
            made from, or an array or option is bad.
        MissingComponent: OpenCV is not installed.
    """
    if method not in HOMOGRAPHY_METHODS:
        raise InputError(f"unknown method {method!r}", f"choose one of {', '.join(HOMOGRAPHY_METHODS)}")
    if not 0 < threshold < np.inf:
        raise InputError(f"threshold is {threshold:g} px", "it is a positive number")
    start, end = (np.asarray(array, np.float64) for array in (source_points, points))
    if start.ndim != 2 or start.shape[1:] != (2,) or start.shape != end.shape:
        raise InputError(f"matches must be two arrays [N, 2], got {list(start.shape)} and {list(end.shape)}")
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        raise InputError("the matches hold NaN or infinity")
    if len(start) < _FEWEST:
        raise InputError(f"a homography needs four matches, there are {len(start)}", "use more points")
    cv2 = opencv()
    flag = {"usac": cv2.USAC_MAGSAC, "ransac": cv2.RANSAC, "lmeds": cv2.LMEDS}[method]
    try:
        matrix, mask = cv2.findHomography(start, end, flag, threshold)
    except cv2.error:  # some versions raise it for degenerate points
        matrix = None
    refused = InputError(
        f"no homography: too few of the {len(start)} matches agree",
        "use more points; a scene that is not flat has none",
    )
    if matrix is None or not np.isfinite(matrix).all() or matrix.shape != (3, 3):
        raise refused
    inliers = mask.ravel().astype(bool)
    projected = project_points(matrix, start[inliers])
    # Any four matches agree with some homography, so four inliers out of more matches say nothing.
    if inliers.sum() < min(len(start), _FEWEST + 1) or not np.isfinite(projected).all():
        raise refused
    error = np.linalg.norm(projected - end[inliers], axis=1).mean()
    return Homography(matrix, inliers, float(error))


def cell_threshold(target: FeatureMap) -> float:
    """The threshold for matches of cells: half the longer side of a target cell, and at least 3 px.

    It was measured on affine warps of smooth synthetic features with noise and cells of 16x12 px. The error
    at the image's corners is 27.8 px with cell centres and a threshold of 3 px (the identity of the grid
    wins), 5 to 8 px with cell centres and 8 px, and 0.2 to 2.4 px with `refine="window"` and 8 px.
    """
    return max(3.0, cell_side(target) / 2)


def project_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points [N, 2] by a homography [3, 3]; points that go to infinity become infinite."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ matrix.T
    with np.errstate(divide="ignore", invalid="ignore"):
        projected: np.ndarray = homogeneous[:, :2] / homogeneous[:, 2:]
    return projected


def opencv() -> Any:
    """Import OpenCV's module cv2.

    Raises:
        MissingComponent: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise missing_extra("OpenCV", "eval") from None
    return cv2
