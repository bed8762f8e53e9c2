from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.images import fit_image


@pytest.fixture
def picture() -> Image.Image:
    """An image of noise, 40 px high and 60 px wide."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (32, 80), (80, 8)])
def test_stretch_is_pillow_bicubic(picture, size):
    pixels, covered = fit_image(picture, size)
    expected = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels, expected)
    assert covered == size


@pytest.mark.parametrize(
    ("size", "inside"),
    [((64, 64), (43, 64)), ((80, 60), (40, 60)), ((20, 90), (20, 30)), ((40, 60), (40, 60))],
)
def test_pad_keeps_the_aspect(picture, size, inside):
    pixels, covered = fit_image(picture, size, "pad")
    rows, columns = inside
    assert covered == inside
    np.testing.assert_array_equal(
        pixels[:rows, :columns], picture.resize((columns, rows), Image.Resampling.BICUBIC)
    )
    assert (pixels[rows:] == 128).all()
    assert (pixels[:, columns:] == 128).all()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    image=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
)
def test_pad_fills_one_axis(image, size):
    pixels, covered = fit_image(Image.new("RGB", image), size, "pad")
    assert pixels.shape == (*size, 3)
    assert covered[0] == size[0] or covered[1] == size[1]
    scale = min(size[0] / image[1], size[1] / image[0])
    # The image's own aspect but for rounding to whole pixels, of which there is at least one.
    assert abs(covered[0] - image[1] * scale) <= 1
    assert abs(covered[1] - image[0] * scale) <= 1


def test_unknown_fit(picture):
    with pytest.raises(InputError, match="unknown fit 'crop'") as caught:
        fit_image(picture, (8, 8), "crop")
    assert "pad" in caught.value.fix
