from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditf.calib.eval.pck import Scored, by_category, by_keypoint, pck, score

BOX = (10.0, 20.0, 50.0, 40.0)  # 40 wide, 20 high


def test_the_limit_is_a_share_of_the_longer_side_and_included():
    truth = np.zeros((4, 2))
    found = np.array([[0, 0], [4, 0], [0, 4.001], [3, 4]])
    scored = score(found, truth, BOX, "abcd", "x")
    np.testing.assert_allclose(scored.distances, [0, 0.1, 4.001 / 40, 0.125])
    assert pck([scored], 0.1) == 0.5
    assert pck([scored], 0.125) == 1.0


def test_per_point_not_per_pair():
    one, many = Scored(np.zeros(1), "a", "x"), Scored(np.ones(3), "abc", "y")
    assert pck([one, many], 0.1) == 0.25
    assert by_category([one, many], 0.1) == {"x": 1.0, "y": 0.0}
    assert by_keypoint([one, many], 0.1) == {"a": 0.5, "b": 0.0, "c": 0.0}


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1), st.floats(0, 1))
def test_against_counting_by_hand(distances, alpha):
    scored = [Scored(np.array(one), [str(i) for i in range(len(one))], "x") for one in distances]
    hits = sum(1 for one in distances for value in one if value <= alpha)
    assert pck(scored, alpha) == pytest.approx(hits / sum(map(len, distances)))
