from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.calib.channels import FLOAT16_MAX, MASSIVE_RATIO, ChannelStatistics, channel_statistics
from ditf.runtime.errors import InputError


def tokens(seed: int, planted: dict[int, float] | None = None) -> np.ndarray:
    """Hidden states [50, 32] of one image, with large biases planted at some channels."""
    hidden = np.random.default_rng(seed).standard_normal((50, 32)).astype(np.float32)
    for channel, value in (planted or {}).items():
        hidden[:, channel] += value
    return hidden


@pytest.mark.parametrize("value", [30.0, -30.0, 1e5, -2e5])
def test_planted_channels_are_found(value):
    planted = {5: value, 17: -value}
    statistics = channel_statistics([tokens(seed, planted) for seed in range(3)])
    assert statistics.massive == [5, 17]
    assert statistics.images == 3


def test_ordinary_channels_are_not_massive():
    assert channel_statistics([tokens(0)]).massive == []
    assert channel_statistics([tokens(0, {3: 5.0})]).massive == []  # five times the median


def test_one_large_token_is_not_a_massive_channel():
    hidden = tokens(0)
    hidden[7, 3] = 200.0  # a mean of 4 over 50 tokens
    statistics = channel_statistics([hidden])
    assert statistics.massive == []
    assert statistics.max_abs[3] == 200.0


def test_ratio_is_a_strict_limit():
    mean_abs = np.array([1.0, 1.0, 1.0, MASSIVE_RATIO, np.nextafter(MASSIVE_RATIO, 11)])
    assert ChannelStatistics(mean_abs, mean_abs, mean_abs, mean_abs, 1).massive == [4]


def test_statistics_are_over_tokens_and_images():
    first, second = np.array([[1.0, -2.0], [3.0, 0.0]]), np.array([[-5.0, 4.0], [-5.0, 4.0]])
    statistics = channel_statistics([first, second])
    np.testing.assert_allclose(statistics.mean_abs, [3.5, 2.5])
    np.testing.assert_array_equal(statistics.max_abs, [5.0, 4.0])
    assert statistics.median == 3.0


def test_zero_hidden_states():
    document = channel_statistics([np.zeros((4, 8), np.float32)]).to_json()
    assert document["massive_channels"] == []
    json.dumps(document, allow_nan=False)


def test_json():
    statistics = channel_statistics([tokens(seed, {5: 131_008.0}) for seed in range(2)])
    document = json.loads(json.dumps(statistics.to_json(), allow_nan=False))
    (massive,) = document["massive_channels"]
    assert massive["channel"] == 5
    assert massive["ratio"] == pytest.approx(massive["mean_abs"] / document["median_channel"])
    assert document["headroom_to_65504"] == pytest.approx(FLOAT16_MAX / document["max_abs"])
    assert document["headroom_to_65504"] < 0.51  # planted at twice the largest float16
    assert len(document["mean_abs"]) == 32
    assert document["images"] == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_hidden_states_name_the_image(bad):
    hidden = tokens(1)
    hidden[3, 4] = bad
    with pytest.raises(InputError, match="calibration image 1") as caught:
        channel_statistics([tokens(0), hidden])
    assert "weights" in caught.value.fix


def test_no_images():
    with pytest.raises(InputError, match="at least one image"):
        channel_statistics([])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 1000), channels=st.sets(st.integers(0, 31), max_size=5), power=st.integers(6, 18))
def test_any_planted_channels_are_found(seed, channels, power):
    planted = dict.fromkeys(channels, 2.0**power)  # the median channel's mean |x| is 0.8
    assert channel_statistics([tokens(seed, planted)]).massive == sorted(channels)
