from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditf.runtime.features_runner import split


@pytest.mark.parametrize(
    ("count", "ranges", "expected"),
    [
        (5, (), [(5, 5)]),
        (5, ((3, 3),), [(3, 3), (2, 3)]),
        (3, ((1, 1),), [(1, 1)] * 3),
        (11, ((1, 8),), [(8, 8), (3, 3)]),
        (9, ((1, 1), (8, 8)), [(8, 8), (1, 1)]),
        (3, ((1, 1), (8, 8)), [(3, 8)]),
        (1, ((2, 4),), [(1, 2)]),
    ],
)
def test_batches(count, ranges, expected):
    assert list(split(count, ranges)) == expected


@given(
    count=st.integers(1, 50),
    ranges=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda t: (t[0], t[0] + t[1])), min_size=1
    ),
)
def test_every_image_is_run_once_in_a_batch_that_fits(count, ranges):
    batches = list(split(count, ranges))
    assert sum(wanted for wanted, _ in batches) == count
    for wanted, size in batches:
        assert 1 <= wanted <= size
        assert any(low <= size <= high for low, high in ranges)
