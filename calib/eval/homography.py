"""Accuracy of estimated homographies by the mean distance of warped corners (see `datasets.hpatches`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ditf.calib.eval.correspondence import Report, quiet
from ditf.calib.eval.datasets.base import read_image
from ditf.calib.eval.datasets.hpatches import SHORT_SIDE, HomographyPair
from ditf.calib.eval.outcomes import Outcome

LIMITS = (1.0, 3.0, 5.0)  # px

HomographyEstimator = Callable[[HomographyPair], "np.ndarray | None"]
"""Returns the homography [3, 3] from pixels of a pair's source to pixels of its target, or None."""


def corners_of(size: tuple[int, int]) -> np.ndarray:
    """Corner pixels of an image of size (H, W), float64 [4, 2] (x, y), clockwise."""
    height, width = size
    return np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float64)


def warp(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    """Map points [N, 2] by a homography [3, 3]; a point that goes to infinity becomes infinite."""
    warped = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ homography.T
    with np.errstate(divide="ignore", invalid="ignore"):
        result: np.ndarray = warped[:, :2] / warped[:, 2:]
    return result


def corner_error(estimate: np.ndarray | None, truth: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance in px of the corners of an image of size (H, W) warped by two homographies.

    The distance is infinite if there is no estimate.
    """
    if estimate is None:
        return float("inf")
    corners = corners_of(size)
    distances = np.linalg.norm(warp(corners, np.asarray(estimate, np.float64)) - warp(corners, truth), axis=1)
    return float(distances.mean()) if np.isfinite(distances).all() else float("inf")


def evaluate_homographies(
    pairs: Sequence[HomographyPair], estimate: HomographyEstimator, report: Report = quiet
) -> list[Outcome]:
    """Estimate the homography of every pair.

    Returns:
        One outcome per pair with "homography_accuracy" at 1, 3 and 5 px of images whose shorter side is 480,
        and "homography_found".
    """
    outcomes = []
    for index, pair in enumerate(pairs):
        report(pair.name, index, len(pairs))
        found = estimate(pair)
        source, target = (read_image(image).shape for image in pair.images)
        error = corner_error(found, pair.homography, (source[0], source[1]))
        error *= SHORT_SIDE / min(target[:2])
        shares = {("homography_accuracy", f"{limit:g}"): (float(error <= limit), 1.0) for limit in LIMITS}
        shares["homography_found", ""] = (float(found is not None), 1.0)
        outcomes.append(Outcome(pair.name, pair.category, pair.group, shares, found=found))
    return outcomes
