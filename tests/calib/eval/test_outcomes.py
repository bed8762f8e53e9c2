from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.eval.outcomes import Outcome, by_category, by_keypoint, category_mean, difference, totals

KEY = ("pck", "0.1")


def outcome(name, hits, total, category="x"):
    return Outcome(name, category, "", {KEY: (hits, total)})


def test_sums_over_weights():
    units = [outcome("a", 1, 1), outcome("b", 0, 3, "y"), outcome("c", 2, 4, "y")]
    assert totals(units) == {"pck": {"0.1": 3 / 8}}
    assert by_category(units) == {"x": {"pck": {"0.1": 1.0}}, "y": {"pck": {"0.1": 2 / 7}}}
    assert category_mean(units) == {"pck": {"0.1": (1 + 2 / 7) / 2}}


def test_by_keypoint():
    one = Outcome("a", "x", "", {KEY: (1, 2)}, {KEY: np.array([True, False])})
    other = Outcome("b", "x", "", {KEY: (1, 1)}, {KEY: np.array([True])})
    assert by_keypoint([one, other], [["nose", "tail"], ["tail"]], KEY) == {"nose": 1.0, "tail": 0.5}


hits = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30)


@settings(deadline=None, max_examples=30)
@given(hits)
def test_the_difference_is_paired_and_antisymmetric(pairs):
    ones = [outcome(str(i), a, 5) for i, (a, _) in enumerate(pairs)]
    others = [outcome(str(i), b, 5) for i, (_, b) in enumerate(pairs)]
    there, back = difference(ones, others, KEY), difference(others, ones, KEY)
    assert there.value == pytest.approx(sum(a - b for a, b in pairs) / (5 * len(pairs)))
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))
    assert there.low - 1e-12 <= there.high
    nothing = difference(ones, ones, KEY)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)  # paired: what both share cancels
    assert not nothing.certain


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """100 draws of 60 pairs, true difference 0.1: at 95 %, 88 to 99 of the intervals hold it (2.7 sigma)."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        base, better = rng.binomial(8, 0.5, 60), rng.binomial(8, 0.6, 60)
        ones, others = ([outcome(str(i), int(h), 8) for i, h in enumerate(side)] for side in (better, base))
        found = difference(ones, others, KEY)
        covered += found.low <= 0.1 <= found.high
    assert 88 <= covered <= 99


def test_a_single_pair_is_resampled_by_points():
    def single(values):
        return [Outcome("a", "x", "", {KEY: (sum(values), 50)}, {KEY: np.array(values)})]

    found = difference(single([1] * 40 + [0] * 10), single([0] * 40 + [1] * 10), KEY)
    assert found.units == "50 points of one pair"
    assert found.low < 0.6 < found.high
    assert found.certain


def test_other_items_cannot_be_compared():
    with pytest.raises(ValueError, match="different items"):
        difference([outcome("a", 1, 1)], [outcome("b", 1, 1)], KEY)
