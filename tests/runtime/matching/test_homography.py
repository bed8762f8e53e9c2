from __future__ import annotations

import sys

import numpy as np
import pytest

from ditf.runtime.errors import InputError, MissingComponent
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.homography import (
    HOMOGRAPHY_METHODS,
    cell_threshold,
    find_homography,
    project_points,
)
from ditf.runtime.matching.mutual import mutual_matches

TRUTH = np.array([[1.1, 0.08, -20.0], [-0.05, 0.95, 12.0], [1e-4, -5e-5, 1.0]])


def matches(count: int, outliers: float, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, the places where TRUTH takes them, and which of these places were left right."""
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 500, (count, 2))
    ends = project_points(TRUTH, points) + rng.normal(0, noise, (count, 2))
    wrong = rng.permutation(count) < outliers * count
    ends[wrong] = rng.uniform(0, 500, (wrong.sum(), 2))
    return points, ends, ~wrong


@pytest.mark.parametrize("method", HOMOGRAPHY_METHODS)
def test_found_among_outliers(method):
    points, ends, right = matches(200, outliers=0.4)
    found = find_homography(points, ends, method=method)
    corners = np.array([[0, 0], [500, 0], [0, 500], [500, 500]])
    assert (
        np.linalg.norm(project_points(found.matrix, corners) - project_points(TRUTH, corners), axis=1).max()
        < 1.5
    )
    assert found.matrix[2, 2] == pytest.approx(1)
    assert (found.inliers == right).mean() > 0.9
    # the mean length of two normal deviations of 0.3 px is 0.376 px
    assert found.error_px == pytest.approx(0.376, abs=0.1)


@pytest.mark.parametrize("method", HOMOGRAPHY_METHODS)
def test_the_same_every_time(method):
    points, ends, _ = matches(100, outliers=0.3)
    first, second = (find_homography(points, ends, method=method) for _ in range(2))
    np.testing.assert_array_equal(first.matrix, second.matrix)
    np.testing.assert_array_equal(first.inliers, second.inliers)


@pytest.mark.parametrize("method", HOMOGRAPHY_METHODS)
def test_four_exact_matches(method):
    points = np.array([[0, 0], [100, 0], [0, 100], [100, 120]], np.float32)
    found = find_homography(points, project_points(TRUTH, points), method=method)
    np.testing.assert_allclose(found.matrix, TRUTH, rtol=0, atol=1e-2)
    assert found.inliers.all()
    assert found.error_px < 1e-2


def test_threshold():
    points, ends, _ = matches(200, outliers=0.0, noise=1.0)
    counts = [find_homography(points, ends, limit, "ransac").inliers.sum() for limit in (0.5, 1.0, 5.0)]
    assert counts[0] < counts[1] < counts[2] == 200


@pytest.mark.parametrize("method", HOMOGRAPHY_METHODS)
@pytest.mark.parametrize("what", ["one place", "one line", "one place to many"])
def test_degenerate_matches_are_refused(what, method):
    line = np.stack([np.arange(20.0), 2 * np.arange(20.0)], axis=1)
    points, ends = {
        "one place": (np.ones((20, 2)), np.ones((20, 2))),
        "one line": (line, line + 3),
        "one place to many": (np.ones((20, 2)), np.random.default_rng(0).uniform(0, 99, (20, 2))),
    }[what]
    with pytest.raises(InputError, match="no homography: too few of the 20 matches agree"):
        find_homography(points, ends, method=method)


@pytest.mark.parametrize(
    ("points", "ends", "options", "problem"),
    [
        (np.zeros((3, 2)), np.zeros((3, 2)), {}, "needs four matches, there are 3"),
        (np.zeros((0, 2)), np.zeros((0, 2)), {}, "there are 0"),
        (np.zeros((5, 2)), np.zeros((6, 2)), {}, r"got \[5, 2\] and \[6, 2\]"),
        (np.zeros((5, 3)), np.zeros((5, 3)), {}, r"got \[5, 3\]"),
        (np.zeros(8), np.zeros(8), {}, r"got \[8\]"),
        (np.full((5, 2), np.nan), np.zeros((5, 2)), {}, "NaN"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {"method": "magic"}, "one of usac, ransac, lmeds"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {"threshold": 0}, "threshold is 0 px"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {"threshold": np.nan}, "threshold is nan px"),
    ],
)
def test_bad_input_is_refused(points, ends, options, problem):
    with pytest.raises(InputError, match=problem):
        find_homography(points, ends, **options)


def test_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingComponent, match=r"OpenCV is not installed; run: pip install 'ditf\[eval\]'"):
        find_homography(*matches(10, 0)[:2])


def affine_views(seed: int) -> tuple[FeatureMap, FeatureMap, np.ndarray]:
    """Two views of waves over a plane, with cells of 16x12 px, and the affine map between the views."""
    size, (h, w), matrix = (480, 640), (40, 40), np.array([[1.05, 0.08, -20], [-0.06, 0.96, 15], [0, 0, 1]])
    rng = np.random.default_rng(seed)
    frequency, phase = rng.normal(0, 0.03, (2, 96, 1, 1)), rng.uniform(0, 6.28, (96, 1, 1))
    y, x = np.indices((h, w))
    pixels = np.stack([(x + 0.5) * 16 - 0.5, (y + 0.5) * 12 - 0.5], axis=2).reshape(-1, 2)
    maps = []
    for places in (pixels, project_points(np.linalg.inv(matrix), pixels)):
        u, v = places.T.reshape(2, h, w)
        maps.append(FeatureMap(np.cos(frequency[0] * u + frequency[1] * v + phase).astype(np.float32), size))
    return maps[0], maps[1], matrix


@pytest.mark.parametrize("method", HOMOGRAPHY_METHODS)
def test_of_mutual_matches_of_two_views(method):
    source, target, truth = affine_views(0)
    found = mutual_matches(source, target, refine="window")
    assert cell_threshold(target) == 8
    matrix = find_homography(found.source_points, found.points, cell_threshold(target), method).matrix
    corners = np.array([[0, 0], [640, 0], [0, 480], [640, 480]])
    assert np.linalg.norm(project_points(matrix, corners) - project_points(truth, corners), axis=1).max() < 4
