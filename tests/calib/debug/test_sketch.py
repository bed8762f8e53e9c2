"""A sketch tells tensors apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditf.calib.debug.sketch import BUCKETS, PATTERNS, sketch, worst_error


@given(st.integers(1, 3 * BUCKETS), st.integers(1, 9), st.integers(0, 99))
def test_a_sketch_is_linear(channels, rows, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, rows, channels)).astype(np.float32)
    assert sketch(a).shape == (PATTERNS * min(channels, BUCKETS),)
    np.testing.assert_allclose(sketch(a + b), sketch(a) + sketch(b), atol=1e-3)


@pytest.mark.parametrize("channels", [48, 1152])
def test_rounding_is_small_and_one_wrong_channel_is_not(channels):
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((1, 100, channels)).astype(np.float32)
    expected = sketch(tensor)
    assert worst_error(sketch(tensor.astype(np.float16)), expected) < 1e-2
    tensor[..., 7] *= -2
    assert worst_error(sketch(tensor), expected) > 0.3


def test_what_is_not_finite_or_of_another_shape_is_off():
    expected = sketch(np.ones((4, 8), np.float32))
    assert worst_error(sketch(np.full((4, 8), np.nan, np.float32)), expected) == np.inf
    assert worst_error(expected[:-1], expected) == np.inf
    assert worst_error(expected, expected) == 0
