from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.images import COUNT, golden_pair, procedural_image, procedural_images

SIZES = [(8, 8), (8, 200), (200, 8), (9, 13), (64, 64), (256, 256), (480, 640)]


@pytest.mark.parametrize("size", SIZES)
def test_shape_and_content(size):
    image = procedural_image(size, 0)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8
    assert image.std() > 10  # never flat


@pytest.mark.parametrize("size", SIZES)
def test_deterministic(size):
    np.testing.assert_array_equal(procedural_image(size, 3), procedural_image(size, 3))
    np.testing.assert_array_equal(golden_pair(size), golden_pair(size))


def test_seeds_give_different_pictures():
    images = procedural_images((32, 32))
    assert len(images) == COUNT
    assert len({image.tobytes() for image in images}) == COUNT
    np.testing.assert_array_equal(images[2], procedural_image((32, 32), 2))
    assert procedural_images((32, 32), 0) == []


@pytest.mark.parametrize("size", SIZES)
def test_golden_pair_is_one_scene_twice(size):
    first, second = pair = golden_pair(size)
    assert pair.shape == (2, *size, 3)
    assert pair.dtype == np.uint8
    assert (first != second).any()


def test_golden_pair_is_not_a_calibration_picture():
    golden = golden_pair((32, 32))[0].tobytes()
    assert golden not in {image.tobytes() for image in procedural_images((32, 32))}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(height=st.integers(8, 60), width=st.integers(8, 60), seed=st.integers(0, 2**32))
def test_any_size_and_seed(height, width, seed):
    assert procedural_image((height, width), seed).shape == (height, width, 3)
