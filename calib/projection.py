"""`--pca`: the projection that preserves cosines between features best, and its cost.

Matching compares cosines, so the projection has to preserve <u, v> of unit tokens u and v, not their
variance. With Q = P^T P for orthonormal rows P, the mean of (<u, v> - <P u, P v>)^2 over pairs of tokens is
|M - Q M Q|_F^2 for the second moment M = E[u u^T], and the leading eigenvectors of M minimise it. The
basis is therefore that of the *uncentred* second moment. Principal component analysis would subtract the mean
first, and cosines of centred features are not DiTF's metric; here the mean is one more direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditf.calib.parity import match_parity
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import TINY_SQUARE
from ditf.runtime.matching.points import match_points

_TOKENS = 512  # of each image whose cosines are compared


@dataclass(frozen=True)
class LearnedProjection:
    """A learned projection.

    Attributes:
        matrix: P, float32 [N, C], with orthonormal rows in descending order of energy.
        energy: share of the unit tokens' squared length that P keeps on the images it was learned from.
    """

    matrix: np.ndarray
    energy: float


class SecondMoment:
    """The second moment M = E[u u^T] of the unit tokens of feature maps.

    Args:
        channels: C.

    Attributes:
        tokens: number of tokens that were added.
        largest: largest length |f| of a token, which no channel of P f exceeds.
    """

    def __init__(self, channels: int) -> None:
        self._sum = np.zeros((channels, channels))
        self.tokens = 0
        self.largest = 0.0

    def add(self, features: np.ndarray) -> None:
        """Add the tokens of a map [C, h, w]."""
        tokens = features.reshape(len(features), -1).T.astype(np.float64)
        lengths = np.linalg.norm(tokens, axis=1)
        self.largest = float(np.maximum(self.largest, lengths.max()))  # NaN stays NaN
        tokens /= np.maximum(lengths, TINY_SQUARE)[:, None]
        self._sum += tokens.T @ tokens
        self.tokens += len(tokens)

    def projection(self, count: int) -> LearnedProjection:
        """The `count` leading eigenvectors, signed so that the entry of largest |x| is positive."""
        values, vectors = np.linalg.eigh(self._sum)  # ascending
        rows = vectors[:, ::-1].T[:count]
        largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
        kept = values[::-1][:count].sum() / max(float(values.sum()), TINY_SQUARE)
        return LearnedProjection((rows * np.sign(largest)).astype(np.float32), float(min(kept, 1.0)))


def project_features(features: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """P F, float32 [N, h, w], for a map F [C, h, w]."""
    channels, h, w = features.shape
    flat = features.reshape(channels, h * w).astype(np.float32, copy=False)
    return (matrix @ flat).reshape(len(matrix), h, w)


def projection_cost(
    full: tuple[np.ndarray, np.ndarray],
    projected: tuple[np.ndarray, np.ndarray],
    points: np.ndarray,
    size: tuple[int, int],
) -> dict[str, float]:
    """Compare projected maps of a pair of images with the full ones.

    Args:
        full, projected: maps of source and target, float32 [C, h, w] and [N, h, w].
        points: [P, 2], (x, y) px of the source.
        size: (H, W) of both images.

    Returns:
        energy_held_out, the share of squared length kept; similarity_cosine and similarity_rms_error, which
        compare the cosines between tokens of the two images before and after; and the metrics of
        `match_parity`.
    """
    before, after = (
        match_points(FeatureMap(source, size), FeatureMap(target, size), points)
        for source, target in (full, projected)
    )
    _, h, w = full[0].shape
    cosines, kept = _cosines(*full), _cosines(*projected)
    squares = [sum(float(np.vdot(one, one)) for one in maps) for maps in (projected, full)]
    product = float((cosines * kept).sum())
    return {
        "energy_held_out": min(1.0, squares[0] / max(squares[1], TINY_SQUARE)),
        "similarity_cosine": product
        / max(float(np.linalg.norm(cosines) * np.linalg.norm(kept)), TINY_SQUARE),
        "similarity_rms_error": float(np.sqrt(np.square(cosines - kept).mean())),
        **match_parity(after.points, before.points, (size[0] / h, size[1] / w)),
    }


def _cosines(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cosines between evenly chosen tokens of two maps, float64."""
    units = []
    for one in (source, target):
        tokens = one.reshape(len(one), -1).T.astype(np.float64)
        tokens = tokens[:: max(1, len(tokens) // _TOKENS)]
        units.append(tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), TINY_SQUARE))
    cosines: np.ndarray = units[0] @ units[1].T
    return cosines
