"""The creatures benchmark: fixed pairs of held-out creatures, matched with a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ditf.calib.eval.creatures import KEYPOINTS, SPECIES, Creature, draw_creature
from ditf.calib.eval.pck import Scored, score

TRAIN, TEST = 1, 2
"""First number of a picture's seed: what the demo model was trained on, and what is held out."""

SIZE = 256  # of the pictures, pixels
PAIRS = 200

Match = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Source and target image uint8 [H, W, 3], points [K, 2] -> matches [K, 2]; (x, y) px."""


def pairs(count: int = PAIRS, cross: bool = False, split: int = TEST) -> Iterator[tuple[Creature, Creature]]:
    """The first pairs of a split; they do not depend on how many are taken.

    Args:
        cross: of different species, each once as often as another; of the same species by default.
    """
    species = len(SPECIES)
    for index in range(count):
        source = index % species
        other = 1 + index // species % (species - 1) if cross else 0
        yield (
            draw_creature(source, (split, 2 * index), SIZE),
            draw_creature((source + other) % species, (split, 2 * index + 1), SIZE),
        )


def evaluate(match: Match, chosen: Iterator[tuple[Creature, Creature]]) -> list[Scored]:
    """Match every keypoint of every pair, by DiTF's protocol: from the source's nearest whole pixel."""
    names = list(SPECIES)
    scored = []
    for source, target in chosen:
        found = match(source.image, target.image, np.rint(source.keypoints))
        scored.append(score(found, target.keypoints, target.box, KEYPOINTS, names[source.species]))
    return scored
