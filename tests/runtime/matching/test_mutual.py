from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching import mutual
from ditf.runtime.matching.cells import cell_centres
from ditf.runtime.matching.mutual import mutual_matches, mutual_points
from ditf.runtime.matching.points import match_points
from tests.runtime.maps import random_map, translated_pair


def slow(source: FeatureMap, target: FeatureMap, ratio: float | None = None) -> set[tuple[int, int]]:
    """Compute the pairs of cells from the definition, in float64."""
    a, b = (one.array.reshape(one.channels, -1).astype(np.float64) for one in (source, target))
    cosines = (a / np.linalg.norm(a, axis=0)).T @ (b / np.linalg.norm(b, axis=0))
    pairs = set()
    for i, row in enumerate(cosines):
        j = int(row.argmax())
        if cosines[:, j].argmax() != i:
            continue
        if ratio is None or (
            distinct(row, target.grid, ratio) and distinct(cosines[:, j], source.grid, ratio)
        ):
            pairs.add((i, j))
    return pairs


def distinct(cosines: np.ndarray, grid: tuple[int, int], ratio: float) -> bool:
    """Apply Lowe's test against the best cell that is no neighbour of the best one."""
    y, x = np.indices(grid)
    best = np.unravel_index(cosines.argmax(), grid)
    away = np.maximum(abs(y - best[0]), abs(x - best[1])).ravel() > 1
    distances = np.sqrt(np.maximum(2 - 2 * cosines, 0))
    return not away.any() or distances.min() < ratio * distances[away].min()


def pairs_of(found: mutual.MutualMatches, source: FeatureMap, target: FeatureMap) -> set[tuple[int, int]]:
    """Convert matches to pairs of cells."""
    cells = []
    for points, features in ((found.source_points, source), (found.points, target)):
        distances = np.abs(points[:, None] - cell_centres(features)).sum(axis=2)
        assert distances.min(axis=1).max(initial=0) < 1e-3
        cells.append(distances.argmin(axis=1).tolist())
    return set(zip(*cells, strict=True))


@pytest.mark.parametrize("ratio", [None, 0.95, 0.9])
@pytest.mark.parametrize("grids", [((7, 9), (6, 11)), ((1, 1), (4, 4)), ((12, 1), (1, 12)), ((2, 2), (1, 1))])
def test_is_the_definition(grids, ratio):
    source, target = random_map(0, (24, *grids[0]), (61, 83)), random_map(1, (24, *grids[1]), (97, 50))
    found = mutual_matches(source, target, ratio=ratio)
    assert pairs_of(found, source, target) == slow(source, target, ratio)


def test_the_ratio_rejects_some_and_not_all():
    source, target = random_map(0, (24, 9, 9), (72, 72)), random_map(1, (24, 9, 9), (72, 72))
    counts = [len(mutual_matches(source, target, ratio=ratio)) for ratio in (None, 1.0, 0.93, 0.5)]
    assert counts[0] >= counts[1] > counts[2] > counts[3] == 0


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    cells=st.tuples(*[st.integers(1, 7)] * 4),
    ratio=st.sampled_from([None, 1.0, 0.9]),
)
def test_swapping_source_and_target_swaps_the_matches(seed, cells, ratio):
    source = random_map(seed, (16, *cells[:2]), (31, 47))
    target = random_map(seed + 1000, (16, *cells[2:]), (53, 29))
    there, back = mutual_matches(source, target, ratio=ratio), mutual_matches(target, source, ratio=ratio)
    pairs = [np.concatenate(sides, axis=1) for sides in (
        (there.source_points, there.points), (back.points, back.source_points)
    )]  # fmt: skip
    np.testing.assert_array_equal(*(one[np.lexsort(one.T)] for one in pairs))
    # Swapping changes the order of summation, so cosines differ by a few float32 roundings.
    np.testing.assert_allclose(np.sort(there.scores), np.sort(back.scores), rtol=0, atol=2e-6)
    assert (np.abs(there.scores) <= 1).all()
    assert (np.diff(there.scores) <= 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), shift=st.tuples(st.integers(-4, 4), st.integers(-4, 4)))
def test_a_translated_image_gives_translated_matches(seed, shift):
    source, target = translated_pair(seed, 64, (12, 14), shift)
    found = mutual_matches(source, target)
    moved = found.source_points + 8 * np.array(shift, np.float32)
    inside = ((moved >= 0) & (moved < (14 * 8, 12 * 8))).all(axis=1)
    assert inside.sum() == (12 - abs(shift[1])) * (14 - abs(shift[0]))
    np.testing.assert_allclose(found.points[inside], moved[inside], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.scores[inside], 1.0, rtol=0, atol=1e-6)  # one step of the comparison


def test_identical_maps_match_to_themselves():
    features = random_map(0, (32, 9, 12), (80, 96))
    found = mutual_matches(features, features, ratio=0.9)
    assert len(found) == 108
    np.testing.assert_array_equal(found.points, found.source_points)
    np.testing.assert_array_equal(found.scores, 1.0)


def test_equal_features_tie_and_the_first_cells_win():
    constant = FeatureMap(np.full((7, 5, 6), 0.3, np.float32), (50, 60))
    found = mutual_matches(constant, constant)
    np.testing.assert_array_equal(found.source_points, [[4.5, 4.5]])
    np.testing.assert_array_equal(found.points, [[4.5, 4.5]])
    assert len(mutual_matches(constant, constant, ratio=1.0)) == 0


def test_zero_features():
    zero = FeatureMap(np.zeros((4, 3, 3), np.float32), (9, 9))
    assert mutual_matches(zero, zero).scores.tolist() == [0]


def test_most_matches_and_step():
    source, target = random_map(0, (24, 11, 13), (110, 130)), random_map(1, (24, 9, 9), (90, 90))
    every = mutual_matches(source, target)
    top = mutual_matches(source, target, max_matches=5)
    np.testing.assert_array_equal(top.source_points, every.source_points[:5])
    np.testing.assert_array_equal(top.scores, every.scores[:5])
    coarse = mutual_matches(source, target, step=3)
    on_grid = (every.source_points // 10 % 3 == 1).all(axis=1)
    assert on_grid.any()
    np.testing.assert_array_equal(coarse.source_points, every.source_points[on_grid])
    np.testing.assert_array_equal(coarse.points, every.points[on_grid])
    assert len(mutual_matches(source, target, step=100)) <= 1


@pytest.mark.parametrize("tile", [1, 100, 1000])
def test_tiles_change_nothing(monkeypatch, tile):
    source, target = random_map(0, (24, 9, 8), (64, 64)), random_map(1, (24, 7, 9), (64, 64))
    whole = mutual_matches(source, target, ratio=0.97)
    monkeypatch.setattr(mutual, "_TILE", tile)
    tiled = mutual_matches(source, target, ratio=0.97)
    np.testing.assert_array_equal(tiled.source_points, whole.source_points)
    np.testing.assert_array_equal(tiled.points, whole.points)


@pytest.mark.parametrize("method", ["argmax", "window"])
def test_given_points_that_come_back(method):
    source, target = translated_pair(0, 64, (12, 14), (3, 0))
    points = [(8 * x + 4, 44) for x in range(14)]
    found = mutual_points(source, target, points, tolerance=4.0, method=method)
    there = {x for x, _ in found.source_points.tolist()}
    assert {8 * x + 4 for x in range(11)} <= there
    np.testing.assert_allclose(found.points - found.source_points, [[24, 0]] * len(found), atol=4)
    if method == "argmax":  # what left the image is found elsewhere, and not from there
        assert len(found) == 11
    assert len(mutual_points(source, target, points, tolerance=0)) <= len(found)
    assert len(mutual_points(source, target, points, max_matches=2)) == 2
    assert len(mutual_points(source, target, [])) == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_matches": 0}, "max_matches is 0; it is 1 or more"),
        ({"step": 0}, "step is 0"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1.1}, r"ratio is 1\.1; it lies in \(0, 1\]"),
        ({"ratio": float("nan")}, "ratio is nan"),
    ],
)
def test_bad_options_are_refused(options, problem):
    features = random_map(0, (8, 3, 3), (10, 12))
    with pytest.raises(InputError, match=problem):
        mutual_matches(features, features, **options)


def test_bad_points_and_maps_are_refused():
    features = random_map(0, (8, 3, 3), (10, 12))
    with pytest.raises(InputError, match="tolerance is -1"):
        mutual_points(features, features, [[1, 1]], tolerance=-1)
    with pytest.raises(InputError, match="outside"):
        mutual_points(features, features, [[12, 1]])
    with pytest.raises(InputError, match="8 and 9 channels"):
        mutual_matches(features, random_map(0, (9, 3, 3), (10, 12)))


@pytest.mark.parametrize("method", ["argmax", "window"])
def test_refined_points_are_those_of_the_method(method):
    source, target = translated_pair(0, 32, (9, 9), (1, 2))
    cells, refined = mutual_matches(source, target), mutual_matches(source, target, refine=method)
    np.testing.assert_array_equal(refined.source_points, cells.source_points)
    np.testing.assert_array_equal(refined.scores, cells.scores)
    expected = match_points(source, target, cells.source_points, method).points
    np.testing.assert_array_equal(refined.points, expected)
    with pytest.raises(InputError, match="unknown method"):
        mutual_matches(source, target, refine="cells")
