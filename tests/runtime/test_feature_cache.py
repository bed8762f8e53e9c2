"""The cache never exceeds its limit, and returns what was put in."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.runtime.feature_cache import FeatureCache, image_key
from ditf.runtime.features import FeatureMap


def feature_map(value, cells):
    return FeatureMap(np.full((1, 1, cells), value, np.float32), (8, 8))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.booleans()), max_size=40))
def test_the_bound_and_the_order(steps):
    """The cache behaves like a plain list in the order of use."""
    limit = 40
    cache, model = FeatureCache(limit), []
    for key, cells, put in steps:
        known = [entry for entry in model if entry[0] == key]
        if put:
            cache.put(bytes([key]), feature_map(key, cells), 1)
            if not known:
                model.append((key, 4 * cells))
                while sum(size for _, size in model) > limit:
                    model.pop(0)
        else:
            found = cache.get(bytes([key]))
            assert (found is None) == (not known)
            if found is not None:
                assert (found.array == key).all()
                model.remove(known[0])
                model.append(known[0])
        assert cache.bytes == sum(size for _, size in model) <= limit
        assert len(cache) == len(model)


def test_what_is_too_large_is_not_kept():
    cache = FeatureCache(10)
    cache.put(b"k", feature_map(1, 3), 1)
    assert cache.get(b"k") is None
    assert cache.bytes == 0


def test_a_row_of_a_batch_does_not_keep_the_batch():
    batch = np.ones((8, 1, 1, 4), np.float32)
    kept = FeatureCache(1000).put(b"k", FeatureMap(batch[3], (8, 8)), 8)
    assert kept.array.base is None


def test_maps_in_a_device_count_the_batch_that_they_keep():
    class Row:
        shape, dtype = (1, 1, 4), np.dtype(np.float32)

    cache = FeatureCache(1000)
    cache.put(b"k", FeatureMap(Row(), (8, 8)), 8)
    assert cache.bytes == 8 * 16


def test_no_cache():
    cache = FeatureCache(0)
    cache.put(b"k", feature_map(1, 1), 1)
    assert len(cache) == 0


def test_keys():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    keys = {
        image_key("a", b"x"),
        image_key("b", b"x"),
        image_key("a", b"y"),
        image_key("a", pixels),
        image_key("a", pixels.reshape(4, 2, 3)),
        image_key("a", pixels.tobytes()),
    }
    assert len(keys) == 6
    assert image_key("a", pixels) == image_key("a", np.asfortranarray(pixels))
