"""Corner error, J and F: what they are at known places, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.eval.homography import corner_error, warp
from ditf.calib.eval.segmentation import boundary, boundary_accuracy, region_similarity, statistics
from tests.calib.eval import published

masks = st.integers(0, 2**32).map(lambda seed: _mask(np.random.default_rng(seed)))


def _mask(rng):
    mask = np.zeros((30, 41), bool)
    for _ in range(rng.integers(0, 4)):
        y, x = rng.integers(0, 30), rng.integers(0, 41)
        mask[y : y + rng.integers(1, 12), x : x + rng.integers(1, 15)] ^= True
    return mask


@settings(deadline=None, max_examples=40)
@given(masks, masks)
def test_j_and_f_equal_counting_pixel_by_pixel(truth, found):
    j, f = published.davis_frame(truth, found)
    assert region_similarity(truth, found) == j
    assert boundary_accuracy(truth, found) == pytest.approx(f, abs=1e-15)
    assert boundary_accuracy(found, truth) == pytest.approx(f, abs=1e-15)
    assert region_similarity(truth, truth) == boundary_accuracy(truth, truth) == 1
    assert {tuple(place) for place in np.argwhere(boundary(truth))} == set(published._edges(truth))


def test_the_bound_is_a_share_of_the_diagonal():
    """At 480p it is 8 px: a boundary 8 px off counts as found, one 9 px off does not."""
    truth = np.zeros((480, 854), bool)
    truth[100:300, 200:500] = True
    assert boundary_accuracy(truth, np.roll(truth, 8, 1)) == 1.0
    assert 0.5 < boundary_accuracy(truth, np.roll(truth, 9, 1)) < 1.0


def test_decay_is_the_first_quarter_less_the_last():
    values = np.array([1.0, 1, 0.9, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0])
    mean, recall, decay = statistics(values)
    assert (mean, recall) == (pytest.approx(0.6), pytest.approx(5 / 9))
    assert decay == pytest.approx(np.mean([1, 1, 0.9]) - np.mean([0.4, 0.2, 0.0]))


def test_corner_error():
    truth = np.array([[1.1, 0.02, 3], [0.01, 0.9, -2], [1e-4, 2e-4, 1]])
    shift = np.array([[1, 0, 3], [0, 1, 4], [0, 0, 1]])
    assert corner_error(truth * -7, truth, (40, 60)) == pytest.approx(0, abs=1e-12)  # up to scale
    assert corner_error(shift @ truth, truth, (40, 60)) == pytest.approx(5)
    assert corner_error(None, truth, (40, 60)) == np.inf
    assert corner_error(np.zeros((3, 3)), truth, (40, 60)) == np.inf
    horizon = np.array([[1, 0, 0], [0, 1, 0], [-1 / 59, 0, 1]])
    assert corner_error(horizon, truth, (40, 60)) == np.inf  # a corner goes to infinity
    np.testing.assert_allclose(warp(np.array([[2.0, 3.0]]), shift), [[5, 7]])
