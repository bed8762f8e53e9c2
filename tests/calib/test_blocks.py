from __future__ import annotations

import json

import numpy as np
import pytest

from ditf.calib.blocks import BlockMeasurement, Entering, degenerate, mismatches
from ditf.runtime.errors import InputError


def entering(seed, scale=None, planted=0.0, text=None):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((60, 16)).astype(np.float32)
    x[:, 3] += planted
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    modulated = normed * (np.ones(16) if scale is None else scale) + rng.standard_normal(16)
    return Entering(x, text, modulated.astype(np.float32))


def measure_blocks(traces, names):
    measurement = BlockMeasurement(names)
    for trace in traces:
        for layer, one in enumerate(trace):
            measurement.add(layer, one)
    return measurement.finish()


def test_the_scale_is_recovered_from_what_the_norm_did():
    scale = np.linspace(-2, 3, 16)
    (block,) = measure_blocks([[entering(0, scale, planted=100.0)]], ["block.0"])
    np.testing.assert_allclose(block.scale, scale, rtol=1e-3, atol=1e-3)  # float32 in, planted channel


def test_massive_channels_by_layer_and_stream():
    text = np.ones((5, 16), np.float32)
    text[:, 7] = -1e5
    traces = [[entering(seed), entering(seed, planted=-200.0, text=text)] for seed in range(3)]
    first, second = measure_blocks(traces, ["double.0", "double.1"])
    assert first.image.massive == []
    assert first.text is None
    assert second.image.massive == [3]
    assert second.text.massive == [7]
    assert second.text.max_abs.max() == 1e5
    entry = second.to_json()["image"]["massive_channels"][0]
    assert entry["token_share"] == 1.0
    assert entry["sign_stability"] == 1.0
    assert 0.4 < first.image.sign_stability.mean() < 0.7
    json.dumps([block.to_json() for block in (first, second)], allow_nan=False)


def test_the_first_block_with_nan_is_named():
    bad = entering(0)
    bad.image[4, 5] = np.nan
    with pytest.raises(InputError, match=r"image tokens that enter single\.1 are NaN .* image 1"):
        measure_blocks([[entering(0)] * 3, [entering(0), bad, bad]], ["single.0", "single.1", "single.2"])


def test_no_images():
    with pytest.raises(InputError, match="at least one image"):
        measure_blocks([], ["block.0"])


def test_pictures_that_say_little():
    flat, noise = np.zeros((8, 8, 3), np.uint8), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert "one colour" in degenerate([flat, flat])
    assert "identical" in degenerate([noise, noise])
    assert degenerate([noise]) is None
    assert degenerate([noise, flat]) is None


def test_what_differs_is_named():
    assert mismatches({"layer": 9, "size": [1, 2]}, {"layer": 8, "size": [1, 2]}) == ["layer 9 instead of 8"]
