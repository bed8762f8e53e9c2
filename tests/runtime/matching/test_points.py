from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching import points as point_matching
from ditf.runtime.matching import pruning
from ditf.runtime.matching.cells import TIE_TOLERANCE, unit_cells
from ditf.runtime.matching.norms import inverse_norms
from ditf.runtime.matching.points import (
    check_points,
    heat_map,
    interpolation_inputs,
    match_points,
)
from tests.runtime.maps import random_map, translated_pair
from tests.runtime.published import ROUNDING, accepted, cosines, upsample


def smooth_map(seed: int, shape: tuple[int, int, int], size: tuple[int, int]) -> FeatureMap:
    """A map with long waves in every channel, so that the cosine has one flat maximum."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]] / max(shape)
    a, b, phase = rng.uniform(-2, 2, (3, shape[0], 1, 1))
    return FeatureMap(np.cos(a * x + b * y + 3 * phase).astype(np.float32), size)


def random_points(seed: int, count: int, size: tuple[int, int], fractional: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if fractional:
        return rng.uniform(0, 1, (count, 2)) * (size[1] - 1, size[0] - 1)
    return rng.integers(0, (size[1], size[0]), (count, 2)).astype(np.float64)


def assert_published(source: FeatureMap, target: FeatureMap, points: np.ndarray) -> None:
    """Check that the matches equal upsampling, normalising and argmax to the pixel."""
    matches = match_points(source, target, points)
    expected = cosines(source, target, points)
    index = (matches.points[:, 1] * target.image_size[1] + matches.points[:, 0]).astype(int)
    allowed = [accepted(scores) for scores in expected]
    wrong = [
        (list(point), list(match), sorted(pixels))
        for point, match, chosen, pixels in zip(points, matches.points, index, allowed, strict=True)
        if chosen not in pixels
    ]
    assert not wrong, f"(source point, match, pixels of the published protocol): {wrong[:5]}"
    np.testing.assert_allclose(matches.scores, expected.max(axis=1), rtol=0, atol=2 * ROUNDING)


CASES = {
    "multiple": ((64, 8, 8), (64, 64), (64, 8, 8), (64, 64)),
    "not-multiple": ((48, 7, 9), (61, 83), (48, 6, 11), (97, 50)),
    "down": ((32, 12, 12), (9, 7), (32, 10, 14), (8, 5)),
    "same-size": ((32, 9, 7), (9, 7), (32, 6, 8), (6, 8)),
    "target-1x1": ((32, 6, 6), (20, 30), (32, 5, 5), (1, 1)),
    "source-1x1": ((32, 6, 6), (1, 1), (32, 5, 5), (40, 30)),
    "one-cell-source": ((32, 1, 1), (20, 30), (32, 5, 5), (40, 30)),
    "one-cell-target": ((32, 5, 5), (20, 30), (32, 1, 1), (40, 30)),
    "one-row": ((32, 1, 9), (20, 90), (32, 9, 1), (90, 20)),
    "many-channels": ((700, 6, 5), (40, 41), (700, 5, 6), (50, 33)),
}


WAYS = {"mixed": pruning._CROWDED, "pruned": 2.0, "whole": -1.0}
"""Thresholds above which whole rows are computed: the default, never and always."""


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(pruning, "_CROWDED", request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fractional", [False, True], ids=["integer", "fractional"])
@pytest.mark.parametrize("make", [random_map, smooth_map])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_published_protocol(case, make, fractional):
    source_shape, source_size, target_shape, target_size = case
    source, target = make(0, source_shape, source_size), make(1, target_shape, target_size)
    assert_published(source, target, random_points(2, 20, source_size, fractional))


def test_reference_leaves_no_choice():
    # The tests above would be empty if rounding could explain any answer.
    source, target = random_map(0, (64, 7, 9), (61, 83)), random_map(1, (64, 6, 11), (97, 50))
    scores = cosines(source, target, random_points(2, 100, source.image_size))
    assert all(len(accepted(row)) == 1 for row in scores)


@pytest.mark.usefixtures("way")
def test_float16_features():
    source = random_map(0, (64, 7, 9), (61, 83), np.float16)
    target = random_map(1, (64, 6, 11), (97, 50), np.float16)
    assert_published(source, target, random_points(2, 40, source.image_size))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [1e-3, 6e4])
def test_scale_of_the_features_does_not_matter(scale):
    source, target = random_map(0, (48, 7, 9), (61, 83)), random_map(1, (48, 6, 11), (97, 50))
    scaled = [FeatureMap(m.array * np.float32(scale), m.image_size) for m in (source, target)]
    assert_published(*scaled, random_points(2, 40, source.image_size))


@pytest.mark.usefixtures("way")
def test_massive_channel():
    # Undiscarded, one channel carries most of every norm.
    source, target = random_map(0, (48, 7, 9), (61, 83)), random_map(1, (48, 6, 11), (97, 50))
    for features in (source, target):
        features.array[5] += 40.0
    assert_published(source, target, random_points(2, 40, source.image_size))


def test_many_points():
    source, target = random_map(0, (32, 8, 8), (64, 64)), random_map(1, (32, 8, 8), (40, 40))
    assert_published(source, target, random_points(2, 3000, source.image_size))


def test_order_and_number_of_points_do_not_matter():
    source, target = random_map(0, (32, 8, 8), (64, 64)), random_map(1, (32, 8, 8), (40, 40))
    points = random_points(2, 30, source.image_size)
    together = match_points(source, target, points)
    alone = np.concatenate([match_points(source, target, [point]).points for point in points[::-1]])
    np.testing.assert_array_equal(together.points, alone[::-1])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("extent", [(6.5, 9.0), (6.01, 8.99), (7.0, 8.25)])
def test_partly_covered_cells(extent):
    source = FeatureMap(random_map(0, (32, 7, 9), (1, 1)).array, (60, 81), extent)
    target = FeatureMap(random_map(1, (32, 7, 9), (1, 1)).array, (49, 70), extent)
    points = random_points(2, 30, source.image_size)
    assert_published(source, target, points)
    assert_published(target, source, random_points(3, 30, target.image_size, fractional=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("width", [64, 640])
def test_features_that_change_sign_between_cells(width):
    # Half way between f and -f the upsampled feature vanishes: its norm is a difference of equal numbers.
    # Every pixel of the first half has cosine 1, so the first one wins.
    feature = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    features = FeatureMap(np.stack([feature, -feature], axis=1)[:, None], (1, width))
    assert_published(features, features, np.array([[0.0, 0.0]]))


@pytest.mark.usefixtures("way")
def test_constant_features_tie_and_the_first_pixel_wins():
    constant = FeatureMap(np.full((16, 4, 5), 0.3, np.float32), (37, 41))
    matches = match_points(constant, constant, random_points(0, 10, constant.image_size))
    np.testing.assert_array_equal(matches.points, np.zeros((10, 2)))
    np.testing.assert_allclose(matches.scores, 1.0, rtol=0, atol=ROUNDING)


@pytest.mark.usefixtures("way")
def test_repeated_cells_tie_and_the_first_pixel_wins():
    # Cells (1, 1), (1, 3) and (3, 1) alike: with one pixel a cell the first of them is x=1, y=1.
    array = random_map(0, (32, 5, 5), (1, 1)).array
    array[:, 1, 3] = array[:, 3, 1] = array[:, 1, 1]
    features = FeatureMap(array, (5, 5))
    matches = match_points(features, features, [[1, 1], [3, 1], [1, 3]])
    np.testing.assert_array_equal(matches.points, [[1, 1]] * 3)


@pytest.mark.usefixtures("way")
def test_identical_maps_match_to_themselves():
    features = random_map(0, (96, 10, 12), (80, 96))
    y, x = np.mgrid[4:76, 4:92]  # the outer half cells repeat the edge: all of one is alike
    points = np.stack([x.ravel(), y.ravel()], axis=1)[::7]
    matches = match_points(features, features, points)
    np.testing.assert_array_equal(matches.points, points)
    # The squared norm between unlike cells is a sum with both signs: that costs float32 another bit or two.
    np.testing.assert_allclose(matches.scores, 1.0, rtol=0, atol=1e-6)


def test_fractional_point_is_a_bilinear_sample_of_the_upsampled_map():
    features = random_map(0, (32, 5, 6), (23, 31))
    up = upsample(features).numpy()
    rows, columns, _, _ = interpolation_inputs(features, features, np.array([[10.25, 7.5]]))
    sampled = np.einsum("nh,nw,chw->c", rows, columns, features.array)
    near = up[:, 7:9, 10:12]
    expected = np.einsum("y,x,cyx->c", [0.5, 0.5], [0.75, 0.25], near)
    np.testing.assert_allclose(sampled, expected, rtol=0, atol=1e-6)  # float32 weights, values up to 3


def test_last_pixel_is_inside():
    features = random_map(0, (16, 4, 4), (30, 20))
    assert_published(features, features, np.array([[19, 29], [0, 29], [19, 0]]))


@pytest.mark.usefixtures("way")
def test_zero_vectors_have_cosine_zero():
    zero = FeatureMap(np.zeros((8, 3, 3), np.float32), (10, 12))
    other = random_map(0, (8, 3, 3), (10, 12))
    for source, target in ((zero, other), (other, zero), (zero, zero)):
        matches = match_points(source, target, [[4, 5]])
        np.testing.assert_array_equal(matches.points, [[0, 0]])
        np.testing.assert_array_equal(matches.scores, [0])


@pytest.mark.usefixtures("way")
def test_zero_cells_among_others():
    target = random_map(0, (24, 6, 6), (40, 40))
    target.array[:, 2:4, 2:4] = 0
    assert_published(random_map(1, (24, 6, 6), (30, 30)), target, random_points(2, 30, (30, 30)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("tile", [1, 97, 1000])
@pytest.mark.parametrize("make", [random_map, smooth_map])
def test_tiles_change_nothing(monkeypatch, make, tile):
    source, target = make(0, (32, 8, 8), (64, 64)), make(1, (32, 8, 8), (70, 97))
    points = random_points(2, 40, source.image_size)
    whole = match_points(source, target, points)
    monkeypatch.setattr(point_matching, "_TILE", tile)
    monkeypatch.setattr(pruning, "_TILE", tile)
    tiled = match_points(source, target, points)
    np.testing.assert_array_equal(tiled.points, whole.points)
    np.testing.assert_allclose(tiled.scores, whole.scores, rtol=0, atol=ROUNDING)  # another product shape


@pytest.mark.usefixtures("way")
def test_tie_across_tiles_goes_to_the_first(monkeypatch):
    # Rows 1 and 5 are within the tolerance of each other, the later one the higher.
    array = random_map(0, (32, 8, 4), (1, 1)).array
    array[:, 1] = array[:, 5] * np.float32(3.0)
    array[0, 1] *= np.float32(1 + 1e-4)
    features = FeatureMap(array, (8, 4))
    monkeypatch.setattr(point_matching, "_TILE", 4)
    assert_published(features, features, np.array([[x, 5] for x in range(4)]))
    np.testing.assert_array_equal(match_points(features, features, [[2, 5]]).points, [[2, 1]])


@pytest.mark.parametrize("points", [[], np.zeros((0, 2)), ()], ids=["list", "array", "tuple"])
def test_no_points(points):
    features = random_map(0, (8, 3, 3), (10, 12))
    matches = match_points(features, features, points)
    assert matches.points.shape == (0, 2)
    assert matches.scores.shape == (0,)
    assert matches.points.dtype == matches.scores.dtype == np.float32


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        ([[12, 0]], r"point 12,0 is outside the source image of 12x10 pixels; x is 0\.\.11, y is 0\.\.9"),
        ([[0, 10]], "point 0,10 is outside"),
        ([[0, 0], [-1, 0]], "point -1,0 is outside"),
        ([[0, -0.001]], "is outside"),
        ([[11.01, 0]], "is outside"),
        ([[np.nan, 1]], "point nan,1 is outside"),
        ([[1, np.inf]], "point 1,inf is outside"),
        ([1, 2], r"must be \[N, 2\].*got \[2\]"),
        ([[1, 2, 3]], r"must be \[N, 2\].*got \[1, 3\]"),
        ([[[1, 2]]], r"must be \[N, 2\].*got \[1, 1, 2\]"),
        ([["left", "top"]], "must be numbers"),
        ("12,8", "must be numbers"),
        ([[1, 2], [3]], "must be numbers"),
        ([[1 + 2j, 3]], "must be numbers"),
        ([[{}, 3]], "must be numbers"),
        (None, r"must be \[N, 2\]"),
        ([[10**400, 3]], "outside|must be numbers"),
    ],
)
def test_bad_points_are_refused(points, problem):
    features = random_map(0, (8, 3, 3), (10, 12))
    with pytest.raises(InputError, match=problem) as caught:
        match_points(features, features, points)
    assert "\n" not in str(caught.value)


def test_points_of_any_number_type():
    for points in ([[1, 2]], [(1.0, 2.0)], np.array([[1, 2]], np.uint8), np.array([[1, 2]], np.float16)):
        np.testing.assert_array_equal(check_points(points, (10, 12)), [[1.0, 2.0]])


def test_maps_of_different_models_are_refused():
    with pytest.raises(InputError, match="8 and 9 channels") as caught:
        match_points(random_map(0, (8, 3, 3), (9, 9)), random_map(0, (9, 3, 3), (9, 9)), [[1, 1]])
    assert "same bundle" in caught.value.fix


maps = st.fixed_dictionaries(
    {
        "cells": st.tuples(st.integers(1, 6), st.integers(1, 6)),
        "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    }
)


# Eight channels and more: with fewer, random neighbours are often opposite, which has its own tests above.
@settings(deadline=None, derandomize=True, max_examples=80)
@given(seed=st.integers(0, 10_000), channels=st.integers(8, 40), source=maps, target=maps)
def test_any_maps_are_matched_as_published(seed, channels, source, target):
    first = random_map(seed, (channels, *source["cells"]), source["size"])
    second = random_map(seed + 1, (channels, *target["cells"]), target["size"])
    assert_published(first, second, random_points(seed, 5, first.image_size, fractional=seed % 2 == 1))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 4), source=maps, target=maps)
def test_answers_are_inside_and_scores_are_cosines(seed, channels, source, target):
    first = random_map(seed, (channels, *source["cells"]), source["size"], np.float16)
    second = random_map(seed + 1, (channels, *target["cells"]), target["size"], np.float16)
    matches = match_points(first, second, random_points(seed, 5, first.image_size, fractional=True))
    assert matches.points.dtype == matches.scores.dtype == np.float32
    assert (np.abs(matches.scores) <= 1).all()
    assert (matches.points == np.round(matches.points)).all()
    assert (matches.points >= 0).all()
    assert (matches.points <= (second.image_size[1] - 1, second.image_size[0] - 1)).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_heat_map_is_the_published_cosine_of_every_pixel(case):
    source_shape, source_size, target_shape, target_size = case
    source, target = random_map(0, source_shape, source_size), random_map(1, target_shape, target_size)
    for point in random_points(2, 3, source_size, fractional=True):
        heat = heat_map(source, target, point)
        assert heat.dtype == np.float32
        assert (np.abs(heat) <= 1).all()
        np.testing.assert_allclose(
            heat.ravel(), cosines(source, target, point[None])[0], rtol=0, atol=2 * ROUNDING
        )
        x, y = match_points(source, target, [point]).points[0].astype(int)
        assert heat[y, x] >= heat.max() - TIE_TOLERANCE


@pytest.mark.parametrize("point", [[12, 0], [1], [[1, 2]], "ab", None, [float("nan"), 0]])
def test_heat_map_of_a_bad_point_is_refused(point):
    features = random_map(0, (8, 3, 3), (10, 12))
    with pytest.raises(InputError):
        heat_map(features, features, point)


def test_few_quads_are_left():
    # Else pruning is a cost and no gain. A moved picture, as in use; of unrelated noise a quarter is left.
    source, target = translated_pair(0, 64, (20, 20), (2, 1))
    _, _, rows, columns = interpolation_inputs(source, target, np.zeros((0, 2)))
    inverse_norm = inverse_norms(target.array, rows, columns)
    inner = (unit_cells(source) @ target.array.reshape(64, -1)).reshape(-1, 20, 20)
    possible, crowded = pruning.Pruner(inverse_norm, rows, columns).candidates(inner)
    assert possible.any(axis=(1, 2)).all()
    assert possible.mean() < 0.05
    assert crowded.mean() < 0.2
