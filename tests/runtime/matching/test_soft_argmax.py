"""`window` and `kernel` against GeoAware-SC's and SFNet's steps in float64 PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import cell_centres, to_pixels
from ditf.runtime.matching.points import match_points
from tests.runtime.maps import random_map, translated_pair

CELL_TOLERANCE = 2e-4
"""The tolerance in cells. A float32 cosine is off by 1e-7, which at temperature 0.02 changes a weight by
5e-6, and positions are up to 40 cells away from their mean."""


def published(
    cosines: np.ndarray, method: str, window: int = 15, temperature: float = 0.02, sigma: float = 5
):
    """The expected (x, y) in cells of one query with cosines [h, w]."""
    scores = torch.from_numpy(np.asarray(cosines, np.float64))
    h, w = scores.shape
    best = int(scores.flatten().argmax())
    y, x = best // w, best % w
    mask = torch.zeros_like(scores)
    if method == "window":
        radius = window // 2
        mask[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1] = 1
    else:
        rows, columns = torch.arange(h)[:, None], torch.arange(w)[None]
        mask = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
    weights = torch.softmax((scores * mask).flatten() / temperature, dim=0).reshape(h, w)
    return [float((weights.sum(0) * torch.arange(w)).sum()), float((weights.sum(1) * torch.arange(h)).sum())]


def cell_cosines(source: FeatureMap, target: FeatureMap) -> np.ndarray:
    """The cosines, float64 [source cells, h, w]."""
    a, b = (one.array.reshape(one.channels, -1).astype(np.float64) for one in (source, target))
    a, b = (one / np.linalg.norm(one, axis=0) for one in (a, b))
    return (a.T @ b).reshape(-1, *target.grid)


@pytest.mark.parametrize("method", ["window", "kernel"])
@pytest.mark.parametrize("channels", [4, 256], ids=["high-cosines", "low-cosines"])
@pytest.mark.parametrize("grids", [((6, 7), (20, 17)), ((3, 4), (40, 30)), ((3, 3), (1, 1))])
def test_is_the_published_definition(method, channels, grids):
    # An odd number of pixels to a cell: every cell's centre is a pixel, where the upsampled map is the cell.
    (h, w), (th, tw) = grids
    source = random_map(0, (channels, h, w), (5 * h, 7 * w))
    target = random_map(1, (channels, th, tw), (9 * th, 3 * tw))
    expected = [published(cosines, method) for cosines in cell_cosines(source, target)]
    matches = match_points(source, target, cell_centres(source), method)
    tolerance = 9 * CELL_TOLERANCE
    np.testing.assert_allclose(matches.points, to_pixels(np.array(expected), target), rtol=0, atol=tolerance)
    best = cell_cosines(source, target).max(axis=(1, 2))
    np.testing.assert_allclose(matches.scores, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"window": 3}, {"window": 1}, {"window": 999}, {"temperature": 0.5}, {"temperature": 1e-4}],
    ids=str,
)
def test_options(options):
    source, target = random_map(0, (8, 5, 6), (25, 30)), random_map(1, (8, 11, 9), (33, 27))
    expected = [published(cosines, "window", **options) for cosines in cell_cosines(source, target)]
    matches = match_points(source, target, cell_centres(source), "window", **options)
    # at 1e-4 a cosine's last bits are 2e-3 of a weight
    tolerance = 0.1 if options.get("temperature") == 1e-4 else 3 * CELL_TOLERANCE
    np.testing.assert_allclose(matches.points, to_pixels(np.array(expected), target), rtol=0, atol=tolerance)


def test_sigma():
    source, target = random_map(0, (8, 5, 6), (25, 30)), random_map(1, (8, 11, 9), (33, 27))
    expected = [published(cosines, "kernel", sigma=1.5) for cosines in cell_cosines(source, target)]
    matches = match_points(source, target, cell_centres(source), "kernel", sigma=1.5)
    np.testing.assert_allclose(
        matches.points, to_pixels(np.array(expected), target), rtol=0, atol=3 * CELL_TOLERANCE
    )


def test_what_is_outside_the_window_pulls_where_the_best_cosine_is_low():
    # GeoAware-SC's mask leaves a logit of 0 there. One best cell with cosine 0.1, the others orthogonal:
    # exp(0.1 / 0.02) = 148 against 399 cells of weight 1.
    array = np.zeros((2, 20, 20), np.float32)
    array[1] = 1.0
    array[:, 3, 3] = 0.1, np.sqrt(0.99)
    source = FeatureMap(np.array([1, 0], np.float32).reshape(2, 1, 1), (1, 1))
    matches = match_points(source, FeatureMap(array, (20, 20)), [[0, 0]], "window", window=3)
    weight = np.exp(0.1 / 0.02)
    expected = (3 * weight + 9.5 * 400 - 3) / (weight + 399)
    np.testing.assert_allclose(matches.points, [[expected, expected]], rtol=0, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    shift=st.tuples(st.integers(-5, 5), st.integers(-5, 5)),
    method=st.sampled_from(["argmax", "window", "kernel"]),
)
def test_a_translated_image_gives_translated_matches(seed, shift, method):
    source, target = translated_pair(seed, 128, (16, 18), shift, cell=5)
    y, x = np.mgrid[6:10, 6:12]
    points = np.stack([x.ravel(), y.ravel()], axis=1) * 5 + 2  # centres of cells, all inside the target
    matches = match_points(source, target, points, method)
    # Sub-pixel methods are pulled by neighbours that resemble the best cell, alike on all sides on average.
    tolerance = 0 if method == "argmax" else 0.35 * 5
    np.testing.assert_allclose(matches.points, points + 5 * np.array(shift), rtol=0, atol=tolerance)
    assert (np.abs(matches.scores) <= 1).all()


@pytest.mark.parametrize("method", ["window", "kernel"])
def test_scale_number_and_order_do_not_matter(method):
    source, target = random_map(0, (32, 8, 8), (64, 64)), random_map(1, (32, 9, 7), (40, 30))
    points = np.random.default_rng(0).uniform(0, 63, (150, 2))
    together = match_points(source, target, points, method)
    scaled = FeatureMap(target.array * np.float32(100), target.image_size)
    np.testing.assert_allclose(
        match_points(source, scaled, points, method).points, together.points, rtol=0, atol=1e-3
    )
    alone = np.concatenate([match_points(source, target, [point], method).points for point in points])
    np.testing.assert_allclose(alone, together.points, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["window", "kernel"])
def test_equal_features(method):
    # Every cosine is 1, the first cell is the best one, and half of its window lies beyond the corner.
    constant = FeatureMap(np.full((4, 20, 30), 0.5, np.float32), (20, 30))
    matches = match_points(constant, constant, [[3, 4], [29, 19]], method, window=9)
    np.testing.assert_allclose(matches.scores, 1.0, rtol=0, atol=1e-6)
    cosines = np.ones((20, 30))
    expected = published(cosines, method, window=9)
    np.testing.assert_allclose(matches.points, [expected] * 2, rtol=0, atol=1e-3)


def test_zero_features():
    zero = FeatureMap(np.zeros((4, 3, 3), np.float32), (9, 9))
    matches = match_points(zero, zero, [[1, 1]], "window")
    np.testing.assert_allclose(matches.points, [[4, 4]])  # no cell is better than another
    assert matches.scores.tolist() == [0]


def test_padded_map_stays_inside_its_image():
    source = random_map(0, (16, 4, 4), (20, 20))
    array = random_map(1, (16, 4, 4), (1, 1)).array
    target = FeatureMap(array, (10, 13), (2.25, 4.0))
    points = [[x, y] for x in range(0, 20, 3) for y in range(0, 20, 3)]
    found = match_points(source, target, points, "window", window=1).points
    assert (found >= 0).all()
    assert (found <= (12, 9)).all()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "soft"}, "unknown method 'soft'; choose one of argmax, window, kernel"),
        ({"method": "window", "window": 4}, "odd"),
        ({"method": "window", "window": 0}, "odd"),
        ({"method": "window", "window": -3}, "odd"),
        ({"method": "window", "window": 2.5}, "odd"),
        ({"method": "window", "temperature": 0}, "temperature is 0; it is a positive number"),
        ({"method": "kernel", "temperature": -1}, "temperature is -1"),
        ({"method": "kernel", "temperature": float("nan")}, "temperature is nan"),
        ({"method": "kernel", "sigma": 0}, "sigma is 0"),
    ],
)
def test_bad_options_are_refused(options, problem):
    features = random_map(0, (8, 3, 3), (10, 12))
    with pytest.raises(InputError, match=problem):
        match_points(features, features, [[1, 1]], **options)


@pytest.mark.parametrize("method", ["window", "kernel"])
def test_no_points(method):
    features = random_map(0, (8, 3, 3), (10, 12))
    assert match_points(features, features, [], method).points.shape == (0, 2)
