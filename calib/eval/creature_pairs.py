"""The creatures benchmark: fixed pairs of held-out creatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from ditf.calib.eval.creatures import KEYPOINTS, SPECIES, Creature, draw_creature
from ditf.calib.eval.datasets.base import Pair

TRAIN, TEST = 1, 2
"""First number of a picture's seed: the demo model was trained on TRAIN, and TEST is held out."""

SIZE = 256  # side of the pictures, pixels
PAIRS = 200

GROUPS = ("in species", "across species")


def _pair(index: int, cross: bool, split: int) -> tuple[Creature, Creature]:
    species = len(SPECIES)
    source = index % species
    other = 1 + index // species % (species - 1) if cross else 0
    return (
        draw_creature(source, (split, 2 * index), SIZE),
        draw_creature((source + other) % species, (split, 2 * index + 1), SIZE),
    )


class CreaturePairs(Sequence[Pair]):
    """Pairs for `ditf eval`, drawn on access; the pairs within a species come first.

    Args:
        count: number of pairs within a species and number of pairs across species. A pair does not depend on
            the count, and across species all combinations are equally frequent.
        split: first number of the pictures' seeds.
    """

    def __init__(self, count: int = PAIRS, split: int = TEST) -> None:
        self._count = count
        self._split = split

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
        source, target = _pair(number, bool(group), self._split)
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
