"""Connects a bundle to the benchmarks of `ditf eval`: cached features, and the runtime's matching."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ditf.calib.eval.benchmarks import Benchmark
from ditf.calib.eval.cache import BenchmarkFeatures
from ditf.calib.eval.correspondence import Report, evaluate_flows, evaluate_pairs
from ditf.calib.eval.datasets.base import Pair, Reading
from ditf.calib.eval.datasets.davis import Video
from ditf.calib.eval.datasets.hpatches import HomographyPair
from ditf.calib.eval.datasets.tss import FlowPair
from ditf.calib.eval.homography import evaluate_homographies
from ditf.calib.eval.outcomes import Outcome
from ditf.calib.eval.segmentation import evaluate_videos
from ditf.runtime import Model
from ditf.runtime.bundles.manifest import MANIFEST
from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.flow import dense_flow
from ditf.runtime.matching.homography import cell_threshold, find_homography
from ditf.runtime.matching.mutual import mutual_matches
from ditf.runtime.matching.propagation import Propagator
from ditf.runtime.matching.soft_argmax import METHODS

CATEGORY = "{category}"
"""In a --prompt: the item's category."""

_MATCHES = 1000  # mutual matches from which a homography is found, as in SuperPoint and LoFTR
_NEEDED = 4


class Wiring:
    """Evaluates an opened bundle on a benchmark.

    Args:
        model: the bundle.
        prompt: name of a condition, with CATEGORY in it or not; None is the bundle's first.
        cache: folder of features that are kept.
        method: how points are matched, as in `Model.match`; the first of METHODS is DiTF's protocol.
    """

    def __init__(
        self, model: Model, prompt: str | None, cache: Path | None, method: str = METHODS[0]
    ) -> None:
        self._model = model
        self._options: dict[str, Any] = {} if method == METHODS[0] else {"method": method}
        self._prompt = prompt
        manifest = hashlib.sha256((model.bundle.path / MANIFEST).read_bytes()).hexdigest()
        key = (manifest, model.backend, model.detail, model.fit)
        self.store = BenchmarkFeatures(
            lambda images, name: model.features_of(images, prompt=name), key, cache
        )

    def check_prompts(self, categories: Iterable[str]) -> None:
        """Check that every category has a condition.

        Raises:
            InputError: the bundle lacks some.
        """
        if self._prompt is None:
            return
        wanted = dict.fromkeys(self._name(category) for category in categories)
        lacking = [name for name in wanted if name not in self._model.conditions]
        if lacking:
            names = ", ".join(map(repr, lacking[:4])) + (", ..." if len(lacking) > 4 else "")
            raise InputError(
                f"{self._model.bundle.path} has no condition {names}",
                "export it with --conditioning bank and a --prompt for each",
            )

    def evaluate(self, benchmark: Benchmark, reading: Reading, report: Report) -> list[Outcome]:
        """Run a benchmark over its items."""
        if benchmark.kind == "points":
            return evaluate_pairs(reading.items, self._match, benchmark.criteria, report)
        if benchmark.kind == "homographies":
            return evaluate_homographies(reading.items, self._homography, report)
        if benchmark.kind == "flows":
            return evaluate_flows(reading.items, self._flow, benchmark.criteria, report)
        return evaluate_videos(reading.items, self._propagate, report)

    def _name(self, category: str) -> str | None:
        return None if self._prompt is None else self._prompt.replace(CATEGORY, category)

    def _maps(self, item: Pair | HomographyPair | FlowPair) -> list[FeatureMap]:
        return self.store.maps(item.images, self._name(item.category))

    def _match(self, pair: Pair) -> np.ndarray:
        source, target = self._maps(pair)
        queries = pair.queries(source.image_size)
        return self._model.match(source, target, queries, **self._options).points

    def _homography(self, pair: HomographyPair) -> np.ndarray | None:
        source, target = self._maps(pair)
        # Whole cells would make the grid itself the homography that most matches agree with.
        found = mutual_matches(source, target, max_matches=_MATCHES, refine="window")
        if len(found.points) < _NEEDED:
            return None
        try:
            result = find_homography(found.source_points, found.points, cell_threshold(target))
        except InputError:  # the matches are of one line, or agree on nothing
            return None
        return result.matrix

    def _flow(self, pair: FlowPair) -> np.ndarray:
        source, target = self._maps(pair)
        return dense_flow(source, target).field

    def _propagate(self, video: Video, labels: np.ndarray) -> Iterator[np.ndarray]:
        name = self._name(video.category)
        (first,) = self.store.maps(video.frames[:1], name)
        propagator = Propagator(first, labels)
        for frame in video.frames[1:]:
            (features,) = self.store.maps([frame], name)
            yield propagator.update(features)
