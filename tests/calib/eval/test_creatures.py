from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.eval.creature_pairs import SIZE, TEST, TRAIN, CreaturePairs
from ditf.calib.eval.creatures import KEYPOINTS, SPECIES, draw_creature


@settings(deadline=None, max_examples=40)
@given(st.integers(0, len(SPECIES) - 1), st.integers(0, 2**32), st.sampled_from([16, 64, 100]))
def test_keypoints_lie_on_the_animal(species, seed, size):
    creature = draw_creature(species, seed, size)
    assert creature.image.shape == (size, size, 3)
    assert creature.image.dtype == np.uint8
    assert creature.keypoints.shape == (len(KEYPOINTS), 2)
    x0, y0, x1, y1 = creature.box
    margin = 0.02 * size + 1  # strokes end a little beyond their joints
    assert (creature.keypoints >= np.array([x0, y0]) - margin).all()
    assert (creature.keypoints <= np.array([x1, y1]) + margin).all()
    assert max(x1 - x0, y1 - y0) > 0.7 * size - 1
    assert ((creature.keypoints >= 0) & (creature.keypoints <= size - 1)).all()


def test_the_same_seed_draws_the_same():
    one, other = (draw_creature(2, (1, 5), 64) for _ in range(2))
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.keypoints, other.keypoints)
    assert (draw_creature(3, (1, 5), 64).image != one.image).any()


def test_a_larger_picture_is_the_same_picture():
    small, large = draw_creature(1, 7, 64), draw_creature(1, 7, 256)
    np.testing.assert_allclose((large.keypoints + 0.5) / 4, small.keypoints + 0.5, atol=1e-9)
    shrunk = large.image.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small.image).mean() < 6  # of 255: strokes are whole pixels of either canvas


def test_neither_colour_nor_place_tells_where_a_keypoint_is():
    """The nearest colour, and the same place, are right one time in five at most."""
    by_colour = by_place = total = 0
    for pair in CreaturePairs(24)[:24]:
        limit = 0.1 * pair.reference
        x, y = pair.queries((SIZE, SIZE)).astype(int).T
        colours = pair.source[y, x].astype(float)
        difference = np.abs(pair.target[None].astype(float) - colours[:, None, None]).sum(axis=3)
        flat = difference.reshape(len(colours), -1).argmin(axis=1)
        found = np.stack([flat % SIZE, flat // SIZE], axis=1)
        by_colour += (np.linalg.norm(found - pair.truth, axis=1) <= limit).sum()
        by_place += (np.linalg.norm(pair.points - pair.truth, axis=1) <= limit).sum()
        total += len(colours)
    assert by_colour / total < 0.2
    assert by_place / total < 0.2


def test_pairs_are_fixed_and_held_out():
    few, more = CreaturePairs(3), CreaturePairs(9)
    for index in range(3):
        for one, other in ((few[index], more[index]), (few[3 + index], more[9 + index])):
            assert one.name == other.name
            np.testing.assert_array_equal(one.source, other.source)
            np.testing.assert_array_equal(one.target, other.target)
    assert (CreaturePairs(1, TRAIN)[0].source != few[0].source).any()


def test_species_of_pairs():
    """In species the target is drawn as the source's species, across as another."""
    for index, pair in enumerate(CreaturePairs(9)):
        group, number = divmod(index, 9)
        species = list(SPECIES).index(pair.category)
        same = draw_creature(species, (TEST, 2 * number + 1), SIZE)
        assert (same.image == pair.target).all() == (not group)
