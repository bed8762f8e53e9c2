from __future__ import annotations

import numpy as np
import pytest

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_covers_the_image_unless_told_otherwise(dtype):
    features = FeatureMap(np.ones((3, 4, 5), dtype), (40, 60))
    assert features.cells == (4.0, 5.0)
    assert (features.channels, features.grid) == (3, (4, 5))
    assert "60x40 px" in repr(features)
    assert FeatureMap(features.array, (40, 60), (3.5, 5.0)).cells == (3.5, 5.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_bad_number_is_refused(dtype, bad):
    array = np.ones((3, 4, 5), dtype)
    array[2, 3, 4] = bad
    with pytest.raises(InputError, match="NaN or infinity") as caught:
        FeatureMap(array, (40, 60))
    assert "ditf check" in caught.value.fix
    assert "float32" in caught.value.fix


@pytest.mark.parametrize(
    "array",
    [
        np.ones((4, 5), np.float32),
        np.ones((1, 3, 4, 5), np.float32),
        np.ones((3, 4, 5), np.int32),
        np.ones((3, 4, 5), np.uint8),
        np.ones((3, 4, 5), complex),
        np.ones((0, 4, 5), np.float32),
        np.ones((3, 0, 5), np.float16),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_other_arrays_are_refused(array):
    with pytest.raises(InputError, match=r"float array \[C, h, w\]") as caught:
        FeatureMap(array, (40, 60))
    assert str(array.dtype) in str(caught.value)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_image_size_is_positive(size):
    with pytest.raises(InputError, match="image_size must be positive"):
        FeatureMap(np.ones((3, 4, 5), np.float32), size)
