"""The creatures benchmark: fixed pairs of held-out creatures, matched with a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np

from ditf.calib.eval.creatures import KEYPOINTS, SPECIES, Creature, draw_creature
from ditf.calib.eval.datasets.base import Pair
from ditf.calib.eval.pck import Scored, score

TRAIN, TEST = 1, 2
"""First number of a picture's seed: what the demo model was trained on, and what is held out."""

SIZE = 256  # of the pictures, pixels
PAIRS = 200

GROUPS = ("in species", "across species")

Match = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Source and target image uint8 [H, W, 3], points [K, 2] -> matches [K, 2]; (x, y) px."""


def pairs(count: int = PAIRS, cross: bool = False, split: int = TEST) -> Iterator[tuple[Creature, Creature]]:
    """The first pairs of a split; they do not depend on how many are taken.

    Args:
        cross: of different species, each once as often as another; of the same species by default.
    """
    for index in range(count):
        yield _pair(index, cross, split)


def _pair(index: int, cross: bool, split: int) -> tuple[Creature, Creature]:
    species = len(SPECIES)
    source = index % species
    other = 1 + index // species % (species - 1) if cross else 0
    return (
        draw_creature(source, (split, 2 * index), SIZE),
        draw_creature((source + other) % species, (split, 2 * index + 1), SIZE),
    )


class CreaturePairs(Sequence[Pair]):
    """The held-out pairs as `ditf eval` takes them, drawn when they are asked for.

    Args:
        count: pairs in species, and as many across.
    """

    def __init__(self, count: int = PAIRS) -> None:
        self._count = count

    def __len__(self) -> int:
        return 2 * self._count

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        group, number = divmod(range(len(self))[index], self._count)
        source, target = _pair(number, bool(group), TEST)
        return Pair(
            name=f"{'across' if group else 'in'}-{number}",
            source=source.image,
            target=target.image,
            points=source.keypoints,
            truth=target.keypoints,
            box=target.box,
            category=list(SPECIES)[source.species],
            keypoints=KEYPOINTS,
            group=GROUPS[group],
        )


def evaluate(match: Match, chosen: Iterator[tuple[Creature, Creature]]) -> list[Scored]:
    """Match every keypoint of every pair, by DiTF's protocol: from the source's nearest whole pixel."""
    names = list(SPECIES)
    scored = []
    for source, target in chosen:
        found = match(source.image, target.image, np.rint(source.keypoints))
        scored.append(score(found, target.keypoints, target.box, KEYPOINTS, names[source.species]))
    return scored
