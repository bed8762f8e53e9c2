from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ditf.runtime.matching.interpolation import quadratic_matrix, sample_rows, upsampling_matrix

# The weights are float32: half a unit in the last place of 1, and one more for the difference.
ATOL = 1.2e-7

deterministic = settings(deadline=None, derandomize=True, max_examples=80)
axis = st.integers(1, 40)


def torch_matrix(pixels: int, cells: int, extent: float | None = None) -> np.ndarray:
    """Interpolate the unit vectors of an axis by torch, in float64."""
    units = torch.eye(cells, dtype=torch.float64)[:, None, :, None]  # one unit vector an image
    if extent is None or extent == cells:
        size = functional.interpolate(units, (pixels, 1), mode="bilinear", align_corners=False)
    else:
        size = functional.interpolate(
            units,
            scale_factor=(pixels / extent, 1.0),
            mode="bilinear",
            align_corners=False,
            recompute_scale_factor=False,
        )
    return size[:, 0, :pixels, 0].T.numpy()


@pytest.mark.parametrize(
    ("pixels", "cells"),
    [(1, 1), (7, 1), (1, 7), (8, 8), (16, 4), (481, 32), (100, 7), (3, 8), (31, 32), (640, 40), (2, 2)],
)
def test_is_torch_interpolate(pixels, cells):
    matrix = upsampling_matrix(pixels, cells)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, torch_matrix(pixels, cells), rtol=0, atol=ATOL)


@pytest.mark.parametrize(("pixels", "cells", "extent"), [(100, 8, 7.25), (41, 5, 4.5), (64, 16, 15.001)])
def test_extent_is_torch_interpolate_cut_off(pixels, cells, extent):
    matrix = upsampling_matrix(pixels, cells, extent)
    np.testing.assert_allclose(matrix, torch_matrix(pixels, cells, extent), rtol=0, atol=ATOL)


@deterministic
@given(pixels=axis, cells=axis)
def test_any_size_is_torch_interpolate(pixels, cells):
    expected = torch_matrix(pixels, cells)
    np.testing.assert_allclose(upsampling_matrix(pixels, cells), expected, rtol=0, atol=ATOL)


@deterministic
@given(pixels=axis, cells=axis, share=st.floats(0.01, 1.0))
def test_rows_are_two_neighbours_that_sum_to_one(pixels, cells, share):
    matrix = upsampling_matrix(pixels, cells, cells * share)
    assert matrix.shape == (pixels, cells)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=0, atol=ATOL)
    for row in matrix:
        used = np.flatnonzero(row)
        assert 1 <= len(used) <= 2
        assert used[-1] - used[0] == len(used) - 1


@deterministic
@given(pixels=axis, cells=axis)
def test_upside_down_is_the_same(pixels, cells):
    matrix = upsampling_matrix(pixels, cells)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, rtol=0, atol=2 * ATOL)


@pytest.mark.parametrize(("pixels", "cells"), [(9, 4), (1, 3), (5, 1)])
def test_integer_positions_are_rows(pixels, cells):
    matrix = upsampling_matrix(pixels, cells)
    np.testing.assert_array_equal(sample_rows(matrix, np.arange(pixels, dtype=np.float64)), matrix)


@deterministic
@given(pixels=st.integers(1, 40), cells=axis, share=st.floats(0, 1))
def test_fractional_positions_lie_between_rows(pixels, cells, share):
    matrix = upsampling_matrix(pixels, cells)
    position = share * (pixels - 1)
    (row,) = sample_rows(matrix, np.array([position]))
    low, high = int(np.floor(position)), int(np.ceil(position))
    expected = matrix[low] + (position - low) * (matrix[high].astype(np.float64) - matrix[low])
    np.testing.assert_allclose(row, expected, rtol=0, atol=2 * ATOL)
    assert row.dtype == np.float32


def test_no_positions():
    assert sample_rows(upsampling_matrix(5, 3), np.zeros(0)).shape == (0, 3)


@deterministic
@given(pixels=axis, cells=axis, seed=st.integers(0, 1000))
def test_quadratic_matrix_gives_the_squared_output(pixels, cells, seed):
    matrix = upsampling_matrix(pixels, cells)
    values = np.random.default_rng(seed).standard_normal(cells)
    following = np.append(values[1:], values[-1])
    quadratic = quadratic_matrix(matrix) @ np.concatenate([values**2, 2 * values * following])
    # Four float32 products of values up to about 3.
    np.testing.assert_allclose(quadratic, (matrix @ values) ** 2, rtol=0, atol=1e-5)
