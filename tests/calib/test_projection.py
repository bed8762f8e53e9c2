"""The projection of --pca: what it keeps of cosines, and that it is the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.projection import SecondMoment, project_features, projection_cost


def maps(seed, channels=12, side=6, count=3):
    """Maps whose tokens share a mean and have directions of falling weight, as features do."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(channels, channels)) * np.geomspace(3, 0.03, channels)[:, None]
    mean = rng.normal(size=channels)
    tokens = rng.normal(size=(count, side * side, channels)) @ mix + mean
    return [t.T.reshape(channels, side, side).astype(np.float32) for t in tokens]


def learned(features):
    moment = SecondMoment(len(features[0]))
    for one in features:
        moment.add(one)
    return moment


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12))
def test_rows_are_orthonormal_and_signed(seed, count):
    found = learned(maps(seed)).projection(count)
    assert found.matrix.dtype == np.float32
    # Rounded to float32: each of twelve products has an error of 6e-8.
    np.testing.assert_allclose(found.matrix @ found.matrix.T, np.eye(count), atol=1e-6)
    largest = np.abs(found.matrix).argmax(axis=1)
    assert (found.matrix[np.arange(count), largest] > 0).all()
    assert 0 < found.energy <= 1


def test_fewer_channels_are_the_first_of_more():
    moment = learned(maps(0))
    np.testing.assert_array_equal(moment.projection(3).matrix, moment.projection(7).matrix[:3])


@pytest.mark.parametrize("seed", range(5))
def test_no_other_subspace_keeps_cosines_better(seed):
    """Against principal components about the mean, and against random subspaces."""
    features = maps(seed)
    tokens = np.concatenate([one.reshape(12, -1).T for one in features]).astype(np.float64)
    units = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)

    def error(matrix):
        return np.square(units @ units.T - (units @ matrix.T) @ (units @ matrix.T).T).mean()

    centred = np.linalg.eigh(np.cov(tokens.T))[1][:, ::-1].T[:4]
    rng = np.random.default_rng(seed)
    others = [centred, *(np.linalg.qr(rng.normal(size=(12, 4)))[0].T for _ in range(20))]
    best = error(learned(features).projection(4).matrix)
    assert all(best < error(other) for other in others)


def test_all_channels_lose_nothing():
    source, target = maps(1, count=2)
    matrix = learned([source, target]).projection(12).matrix
    points = np.random.default_rng(0).integers(0, 48, (20, 2))
    found = project_features(source, matrix), project_features(target, matrix)
    cost = projection_cost((source, target), found, points, (48, 48))
    assert cost["energy_held_out"] == pytest.approx(1, abs=1e-6)
    assert cost["similarity_rms_error"] < 1e-6
    assert cost["matches_within_1px"] == 1


def test_the_cost_falls_with_every_channel():
    source, target = maps(2, count=2)
    moment = learned(maps(2, count=4))
    points = np.random.default_rng(0).integers(0, 48, (20, 2))
    costs = []
    for count in (1, 4, 8, 12):
        matrix = moment.projection(count).matrix
        found = project_features(source, matrix), project_features(target, matrix)
        costs.append(projection_cost((source, target), found, points, (48, 48)))
    energy = [cost["energy_held_out"] for cost in costs]
    errors = [cost["similarity_rms_error"] for cost in costs]
    assert energy == sorted(energy)
    assert errors == sorted(errors, reverse=True)
    assert costs[0]["matches_within_1px"] < costs[-1]["matches_within_1px"]


def test_no_channel_exceeds_the_longest_token():
    features = maps(3)
    moment = learned(features)
    matrix = moment.projection(12).matrix
    assert max(np.abs(project_features(one, matrix)).max() for one in features) <= moment.largest * (1 + 1e-6)


def test_tokens_of_zeros_are_no_division_by_zero():
    moment = learned([np.zeros((4, 3, 3), np.float32), np.ones((4, 3, 3), np.float32)])
    np.testing.assert_allclose(moment.projection(1).matrix, [[0.5] * 4], atol=1e-7)
