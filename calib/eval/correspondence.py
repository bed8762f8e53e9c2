"""Comparing matched points and dense flow with the truth: PCK per point and per image, end-point error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ditf.calib.eval.datasets.base import Pair, read_image
from ditf.calib.eval.datasets.tss import FlowPair
from ditf.calib.eval.outcomes import Key, Outcome
from ditf.runtime import Model
from ditf.runtime.errors import InputError

Report = Callable[[str, int, int], None]
"""Called with an item's name, the number of items done, and the number of all items."""

PairMatcher = Callable[[Pair], np.ndarray]
"""Returns matches [K, 2] of a pair's points, (x, y) px of its target."""

FlowEstimator = Callable[[FlowPair], np.ndarray]
"""Returns the flow [H, W, 2] of a pair, (x, y) px, for every pixel of its source."""


SAMPLES = 64  # foreground pixels whose flow a picture shows


def matcher(model: Model) -> PairMatcher:
    """A matcher that computes features of both images and calls `Model.match` from whole source pixels."""

    def match(pair: Pair) -> np.ndarray:
        source, target = model.features_of([read_image(image) for image in pair.images])
        return model.match(source, target, pair.queries(source.image_size)).points

    return match


def quiet(name: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Criteria:
    """When a match is right.

    Attributes:
        alphas: thresholds as shares of an item's reference length.
        pixels: thresholds in pixels.
        strict: whether a distance has to be less than the threshold, not at most.
        error: whether the mean distance is a metric too.
        per_image: whether PCK per image is a metric; it adds nothing if there is a single image.
    """

    alphas: Sequence[float]
    pixels: Sequence[float] = ()
    strict: bool = False
    error: bool = False
    per_image: bool = True

    def shares(self, distances: np.ndarray, reference: float) -> dict[Key, np.ndarray]:
        """The value of each metric at each point.

        Args:
            distances: [K] px.
            reference: the length that alpha is a share of, px.
        """
        less = np.less if self.strict else np.less_equal
        found: dict[Key, np.ndarray] = {}
        for alpha in self.alphas:
            found["pck", f"{alpha:g}"] = less(distances / reference, alpha)
        for limit in self.pixels:
            found["pck_px", f"{limit:g}"] = less(distances, limit)
        if self.error:
            found["epe", ""] = distances
        return found


def evaluate_pairs(
    pairs: Sequence[Pair], match: PairMatcher, criteria: Criteria, report: Report = quiet
) -> list[Outcome]:
    """Match the points of every pair.

    Returns:
        One outcome per pair with "pck" at every alpha and "pck_px" (weight: its points), "pck_per_image"
        (weight 1) and "epe", as the criteria ask.
    """
    outcomes = []
    for index, pair in enumerate(pairs):
        report(pair.name, index, len(pairs))
        found = np.asarray(match(pair), np.float64)
        distances = np.linalg.norm(found - pair.truth, axis=1)
        points = criteria.shares(distances, pair.reference)
        shares = {key: (float(values.sum()), float(len(values))) for key, values in points.items()}
        shares.update(_per_image(shares, criteria))
        outcomes.append(Outcome(pair.name, pair.category, pair.group, shares, points, found))
    return outcomes


def evaluate_flows(
    pairs: Sequence[FlowPair], flow: FlowEstimator, criteria: Criteria, report: Report = quiet
) -> list[Outcome]:
    """Estimate the flow of every pair; see `evaluate_pairs`. "epe" is the mean of the pairs' means.

    `found` is [SAMPLES, 4]: pixels of the foreground and where the flow sends them.

    Raises:
        InputError: a flow of another size than the source.
    """
    outcomes = []
    for index, pair in enumerate(pairs):
        report(pair.name, index, len(pairs))
        estimate = np.asarray(flow(pair))
        truth, known = pair.truth()
        if estimate.shape != truth.shape:
            raise InputError(f"{pair.name}: a flow of {estimate.shape}, the source has {truth.shape}")
        distances = np.linalg.norm(estimate[known].astype(np.float64) - truth[known], axis=1)
        values = criteria.shares(distances, pair.reference)
        shares = {key: (float(found.sum()), float(len(found))) for key, found in values.items()}
        if ("epe", "") in shares:
            shares["epe", ""] = (float(distances.mean()), 1.0)
        places = np.argwhere(known)[:, ::-1]
        places = places[np.linspace(0, len(places) - 1, min(SAMPLES, len(places))).astype(int)]
        ends = places + estimate[places[:, 1], places[:, 0]]
        shown = np.concatenate([places, ends], axis=1)
        shares.update(_per_image(shares, criteria))
        outcomes.append(Outcome(pair.name, pair.category, pair.group, shares, found=shown))
    return outcomes


def _per_image(shares: dict[Key, tuple[float, float]], criteria: Criteria) -> dict[Key, tuple[float, float]]:
    """PCK of one image with weight 1, so that all images count the same."""
    if not criteria.per_image:
        return {}
    return {
        ("pck_per_image", threshold): (total / weight, 1.0)
        for (metric, threshold), (total, weight) in shares.items()
        if metric == "pck"
    }
