"""PCK: the share of keypoints whose match lies near the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

ALPHAS = (0.05, 0.1, 0.15)


@dataclass(frozen=True)
class Scored:
    """Matches of one pair of images, scored.

    Attributes:
        distances: from match to truth over the longer side of the target's box, [K].
        names: of the keypoints; category: of the pair.
    """

    distances: np.ndarray
    names: Sequence[str]
    category: str


def score(
    found: np.ndarray,
    truth: np.ndarray,
    box: tuple[float, float, float, float],
    names: Sequence[str],
    category: str,
) -> Scored:
    """Distances of matches [K, 2] from the truth [K, 2], both (x, y) px of the target image.

    Args:
        box: (x0, y0, x1, y1) of the object in the target.
    """
    longer = max(box[2] - box[0], box[3] - box[1])
    return Scored(np.linalg.norm(found - truth, axis=1) / longer, names, category)


def pck(pairs: Iterable[Scored], alpha: float) -> float:
    """Per point over all pairs: the share of distances of at most `alpha`."""
    distances = np.concatenate([pair.distances for pair in pairs])
    return float((distances <= alpha).mean())


def by_category(pairs: Sequence[Scored], alpha: float) -> dict[str, float]:
    """`pck` of each category, in order of first appearance."""
    names = dict.fromkeys(pair.category for pair in pairs)
    return {name: pck([pair for pair in pairs if pair.category == name], alpha) for name in names}


def by_keypoint(pairs: Sequence[Scored], alpha: float) -> dict[str, float]:
    """`pck` of each keypoint by name."""
    hits: dict[str, list[bool]] = {}
    for pair in pairs:
        for name, distance in zip(pair.names, pair.distances, strict=True):
            hits.setdefault(name, []).append(bool(distance <= alpha))
    return {name: float(np.mean(values)) for name, values in hits.items()}
