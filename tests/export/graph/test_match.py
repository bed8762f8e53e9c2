"""match.onnx's mathematics against DiTF's protocol step by step in plain float64 PyTorch."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ditf.export.bundle_graphs import match_onnx
from ditf.export.graph.match import INPUTS, MatchGraph
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.cells import TIE_TOLERANCE
from ditf.runtime.matching.points import interpolation_inputs
from tests.runtime.published import accepted, cosines, upsample

UNIT = 2.0**-24
"""The rounding of one float32 operation."""


def inputs(source, target, points):
    matrices = interpolation_inputs(source, target, np.asarray(points, np.float64))
    return [torch.from_numpy(array) for array in (source.array[None], target.array[None], *matrices)]


def graph_scores(source, target, points):
    """Every pixel's cosine as the graph computes it, [N, H * W]."""
    with torch.no_grad():
        return MatchGraph().cosines(*inputs(source, target, points)).flatten(1).numpy()


def graph_matches(source, target, points):
    with torch.no_grad():
        found, scores = MatchGraph()(*inputs(source, target, points))
    return (found[:, 1] * target.image_size[1] + found[:, 0]).long().numpy(), scores.numpy()


def cancellation(features):
    """|up(F)| / up(|F|) of every pixel: how far the cells around it cancel."""
    lengths = torch.from_numpy(np.linalg.norm(features.array.astype(np.float64), axis=0))[None, None]
    bound = functional.interpolate(lengths, features.image_size, mode="bilinear", align_corners=False)
    return (upsample(features).norm(dim=0) / bound[0, 0].clamp(min=1e-30)).flatten().numpy()


def near_opposite(seed, channels, grid, size, deviation):
    """A map whose cells are multiples of one vector with random signs, apart from a small deviation."""
    rng = np.random.default_rng(seed)
    cells = rng.standard_normal((channels, 1, 1)) * rng.choice([-3, -2, -1, 1, 2, 3], (1, *grid))
    return FeatureMap((cells + deviation * rng.standard_normal((channels, *grid))).astype(np.float32), size)


def random_map(seed, channels, grid, size):
    array = np.random.default_rng(seed).standard_normal((channels, *grid)).astype(np.float32)
    return FeatureMap(array, size)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    channels=st.sampled_from([1, 2, 3, 16, 80]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    power=st.floats(-6, 0),
)
def test_cosines_are_exact_to_the_rounding_of_the_upsampled_vector(seed, channels, grid, size, power):
    """The cosine of a vector that is rounded in float32 before it is normalised is no better known."""
    target = near_opposite(seed, channels, grid, size, 10.0**power)
    source = random_map(seed + 1, channels, grid, size)
    points = [[0, 0], [size[1] // 2, size[0] // 2]]
    found, expected = graph_scores(source, target, points), cosines(source, target, points)
    ratio = cancellation(target)
    resolved = ratio > 1e-5
    error = np.abs(found - expected)[:, resolved] * ratio[resolved]
    assert error.max(initial=0) <= 32 * UNIT
    assert np.abs(found).max() <= 1


def test_near_opposite_neighbours_keep_their_cosine():
    """Halfway between f and d - f the upsampled vector is d / 2, a thousandth as long as f."""
    rng = np.random.default_rng(0)
    f, d = rng.standard_normal(64), 1e-3 * rng.standard_normal(64)
    target = FeatureMap(np.stack([f, d - f], axis=1)[:, None].astype(np.float32), (1, 41))
    source = FeatureMap(np.stack([d, d], axis=1)[:, None].astype(np.float32), (1, 41))
    assert cancellation(target).min() < 1e-3
    expected = cosines(source, target, [[0, 0]])[0]
    assert expected.argmax() == 20
    assert expected[20] > 0.9999
    pixels, scores = graph_matches(source, target, [[0, 0]])
    assert pixels[0] == 20
    assert scores[0] == pytest.approx(expected[20], abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_one_channel_has_ties_only_and_the_first_pixel_wins(seed, grid, size):
    target, source = random_map(seed, 1, grid, size), random_map(seed + 1, 1, grid, size)
    if cancellation(target).min() < 1e-5 or cancellation(source).min() < 1e-5:
        return  # the sign itself is rounding
    points = [[0, 0], [size[1] - 1, size[0] - 1]]
    expected = cosines(source, target, points)
    first = (expected >= expected.max(axis=1, keepdims=True) - TIE_TOLERANCE).argmax(axis=1)
    pixels, scores = graph_matches(source, target, points)
    np.testing.assert_array_equal(pixels, first)
    np.testing.assert_allclose(scores, expected.max(axis=1), atol=4 * UNIT)


def test_ordinary_maps_match_to_the_pixel():
    source, target = random_map(0, 48, (6, 9), (50, 70)), random_map(1, 48, (6, 9), (50, 70))
    points = np.random.default_rng(2).integers(0, (70, 50), (40, 2))
    pixels, scores = graph_matches(source, target, points)
    expected = cosines(source, target, points)
    assert all(pixel in accepted(row) for pixel, row in zip(pixels, expected, strict=True))
    np.testing.assert_allclose(scores, expected.max(axis=1), atol=32 * UNIT)


def test_a_zero_vector_has_the_cosine_zero_with_everything():
    some = random_map(0, 8, (3, 4), (20, 30))
    nothing = FeatureMap(np.zeros((8, 3, 4), np.float32), (20, 30))
    for source, target in ((some, nothing), (nothing, some), (nothing, nothing)):
        pixels, scores = graph_matches(source, target, [[3, 4]])
        assert (pixels[0], scores[0]) == (0, 0)
    opposite = FeatureMap(np.stack([np.ones((4, 1)), -np.ones((4, 1))], axis=2).astype(np.float32), (1, 3))
    assert graph_scores(FeatureMap(np.ones((4, 1, 2), np.float32), (1, 3)), opposite, [[0, 0]])[0][1] == 0


@pytest.mark.parametrize("channels", [1, 16])
def test_onnx_runtime_computes_the_same(channels):
    target = near_opposite(3, channels, (4, 5), (30, 40), 1e-3)
    source = random_map(4, channels, (4, 5), (30, 40))
    points = np.random.default_rng(5).integers(0, (40, 30), (20, 2))
    session = onnxruntime.InferenceSession(match_onnx(channels, (4, 5), torch.float32, 20))
    feeds = dict(zip(INPUTS, (one.numpy() for one in inputs(source, target, points)), strict=True))
    found, scores = session.run(None, feeds)
    pixels, expected = graph_matches(source, target, points)
    np.testing.assert_array_equal(found[:, 1] * 40 + found[:, 0], pixels)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
