"""The benchmarks of `ditf eval`: how each is read, and when a match counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ditf.calib.eval.correspondence import Criteria
from ditf.calib.eval.creature_pairs import CreaturePairs
from ditf.calib.eval.datasets import ap10k, davis, hpatches, pf_pascal, pf_willow, spair, stereo, tss
from ditf.calib.eval.datasets.base import Reading
from ditf.calib.eval.outcomes import Key
from ditf.runtime.errors import InputError

ALPHAS = (0.05, 0.1, 0.15)

Kind = Literal["points", "homographies", "flows", "videos"]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; the docstring of its reader states the protocol and the source.

    Attributes:
        name: its name on the command line.
        kind: the kind of its items, which decides the evaluation.
        read: function that reads a split from the dataset's folder.
        splits: names of the splits; the first is the default.
        criteria: when a match is right; it has no alphas if the metric has none.
        headline: metric and threshold that tables by category, pictures and --min-pck use.
        needs_data: whether a dataset has to be fetched.
        named: whether keypoints have the same names in every category.
    """

    name: str
    kind: Kind
    read: Callable[[Path, str], Reading]
    splits: tuple[str, ...]
    criteria: Criteria
    headline: Key
    needs_data: bool = True
    named: bool = False

    def with_alphas(self, alphas: list[float]) -> Benchmark:
        """The same benchmark at other alphas.

        Raises:
            InputError: the benchmark has no alpha, or one of them is not a positive number.
        """
        if not self.criteria.alphas:
            raise InputError(f"{self.name} has no alpha", "leave --alpha out")
        if not all(0 < alpha < float("inf") for alpha in alphas):
            raise InputError("--alpha must be positive", "for example --alpha 0.1")
        kept = sorted(set(alphas))
        threshold = self.headline[1] if float(self.headline[1]) in kept else f"{kept[-1]:g}"
        return replace(
            self, criteria=replace(self.criteria, alphas=kept), headline=(self.headline[0], threshold)
        )


def _creatures(data: Path, split: str) -> Reading:
    return Reading(CreaturePairs())


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "spair-71k", "points", spair.read_spair, spair.SPLITS, Criteria((0.01, 0.05, 0.1)), ("pck", "0.1")
        ),
        Benchmark(
            "pf-pascal", "points", pf_pascal.read_pf_pascal, pf_pascal.SPLITS,
            Criteria(ALPHAS), ("pck", "0.1"),
        ),
        Benchmark(
            "pf-willow", "points", pf_willow.read_pf_willow, pf_willow.SPLITS,
            Criteria(ALPHAS), ("pck", "0.1"),
        ),
        Benchmark(
            "ap-10k", "points", ap10k.read_ap10k, ap10k.SPLITS,
            Criteria((0.01, 0.05, 0.1), strict=True), ("pck", "0.1"), named=True,
        ),
        Benchmark(
            "hpatches", "homographies", hpatches.read_hpatches, hpatches.SPLITS,
            Criteria(()), ("homography_accuracy", "3"),
        ),
        Benchmark("davis", "videos", davis.read_davis, davis.SPLITS, Criteria(()), ("davis", "J&F")),
        Benchmark("tss", "flows", tss.read_tss, tss.SPLITS, Criteria((0.05,), error=True), ("pck", "0.05")),
        Benchmark(
            "stereo", "points", stereo.read_stereo, stereo.SPLITS,
            Criteria((0.01, 0.05, 0.1), (1, 3, 5), error=True, per_image=False), ("pck", "0.1"),
            needs_data=False,
        ),
        Benchmark(
            "creatures", "points", _creatures, ("test",),
            Criteria(ALPHAS), ("pck", "0.1"), needs_data=False, named=True,
        ),
    )
}  # fmt: skip
