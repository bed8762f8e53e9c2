from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import cell_centres
from ditf.runtime.matching.flow import dense_flow, warp_image
from ditf.runtime.matching.points import match_points
from tests.runtime.maps import random_map, translated_pair


@pytest.mark.parametrize("method", ["argmax", "window"])
def test_is_the_cells_matches_interpolated(method):
    source, target = random_map(0, (16, 6, 7), (48, 63)), random_map(1, (16, 5, 9), (48, 63))
    flow = dense_flow(source, target, method)
    centres = cell_centres(source)
    matches = match_points(source, target, centres, method)
    # Pixels beyond the outermost centres are all equal; a flow takes the nearest, not the first.
    found = np.clip(matches.points, *cell_centres(target)[[0, -1]])
    maps = np.concatenate([found - centres, matches.scores[:, None]], axis=1)
    expected = functional.interpolate(
        torch.from_numpy(maps.T.reshape(1, 3, 6, 7)), (48, 63), mode="bilinear", align_corners=False
    )[0].numpy()
    np.testing.assert_allclose(flow.field, np.moveaxis(expected[:2], 0, 2), rtol=0, atol=1e-4)
    np.testing.assert_allclose(flow.confidence, expected[2], rtol=0, atol=1e-6)
    assert flow.field.dtype == flow.confidence.dtype == np.float32


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), shift=st.tuples(st.integers(-3, 3), st.integers(-3, 3)))
def test_a_translated_image_gives_one_flow(seed, shift):
    source, target = translated_pair(seed, 64, (12, 14), shift, cell=5)
    flow = dense_flow(source, target)
    x, y = (
        slice(5 * max(0, -one) + 2, length - 5 * max(0, one) - 2)
        for one, length in zip(shift, (70, 60), strict=True)
    )
    # what stays in view, but for half a cell towards the part that left
    inner = (y, x)
    expected = np.broadcast_to(5.0 * np.array(shift), flow.field[inner].shape)
    np.testing.assert_allclose(flow.field[inner], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(flow.confidence[inner], 1.0, rtol=0, atol=2e-6)
    assert (np.abs(flow.confidence) <= 1).all()


def test_identical_maps_do_not_move():
    features = random_map(0, (32, 7, 9), (35, 45))
    field = dense_flow(features, features).field
    np.testing.assert_allclose(field, 0, rtol=0, atol=1e-4)


def test_images_of_different_sizes():
    # One scene, once at 45x35 and once at 90x105 pixels: everything lies where stretching takes it.
    small = random_map(0, (32, 7, 9), (35, 45))
    large = FeatureMap(small.array, (105, 90))
    flow = dense_flow(small, large)
    y, x = np.mgrid[:35, :45]
    expected = np.stack([(x + 0.5) * 2 - 0.5 - x, (y + 0.5) * 3 - 0.5 - y], axis=2)
    # even sizes: a cell's centre lies between two pixels
    np.testing.assert_allclose(flow.field, expected, rtol=0, atol=0.51)


def test_one_cell():
    one = random_map(0, (8, 1, 1), (4, 6))
    flow = dense_flow(one, one)
    assert flow.field.shape == (4, 6, 2)
    np.testing.assert_allclose(flow.confidence, 1.0, atol=1e-6)
    assert dense_flow(random_map(0, (8, 1, 1), (1, 1)), one).field.shape == (1, 1, 2)


def test_padded_map():
    array = random_map(0, (8, 3, 3), (1, 1)).array
    source = FeatureMap(array, (20, 30), (2.25, 3.0))
    assert np.isfinite(dense_flow(source, source).field).all()


def test_bad_input_is_refused():
    features = random_map(0, (8, 3, 3), (9, 9))
    with pytest.raises(InputError, match="unknown method"):
        dense_flow(features, features, "optical")
    with pytest.raises(InputError, match="channels"):
        dense_flow(features, random_map(0, (9, 3, 3), (9, 9)))


def test_warp_is_a_bilinear_sample():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    flow = rng.uniform(-8, 8, (15, 25, 2)).astype(np.float32)
    y, x = np.mgrid[:15, :25]
    grid = np.stack([(x + flow[..., 0]) / 29 * 2 - 1, (y + flow[..., 1]) / 19 * 2 - 1], axis=2)
    expected = functional.grid_sample(
        torch.from_numpy(image).permute(2, 0, 1)[None].double(),
        torch.from_numpy(grid)[None],
        padding_mode="border",
        align_corners=True,
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(warp_image(image, flow), expected, rtol=0, atol=0.51)
    np.testing.assert_array_equal(warp_image(image, np.zeros((20, 30, 2), np.float32)), image)
