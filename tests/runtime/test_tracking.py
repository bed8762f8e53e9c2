from __future__ import annotations

import numpy as np
import pytest

import ditf
from ditf.calib.images import procedural_images
from ditf.runtime.errors import InputError

POINTS = [(10.0, 12.0), (40.5, 30.25)]


@pytest.fixture(scope="module")
def model(pixart_bundle):
    with ditf.load(pixart_bundle) as opened:
        yield opened


def test_every_frame_is_matched_against_the_source(model):
    source, *frames = procedural_images((48, 80), 4)
    tracker = model.track(source, POINTS)
    one_by_one = [tracker.update(frame) for frame in frames]
    together = tracker.update_all(frames)
    for frame, single, batched in zip(frames, one_by_one, together, strict=True):
        direct = model.match(model.features(source), model.features(frame), POINTS)
        np.testing.assert_array_equal(single.points, direct.points)
        np.testing.assert_array_equal(single.scores, direct.scores)
        np.testing.assert_array_equal(batched.points, direct.points)
    assert tracker.update_all([]) == []


def test_points_are_checked_at_the_start(model):
    with pytest.raises(InputError, match="outside the source image"):
        model.track(procedural_images((48, 80), 1)[0], [(80, 1)])


def test_a_bad_frame_ends_nothing(model):
    source, frame = procedural_images((48, 80), 2)
    tracker = model.track(source, POINTS)
    with pytest.raises(InputError):
        tracker.update(np.zeros((3, 3)))
    assert len(tracker.update(frame).points) == 2
