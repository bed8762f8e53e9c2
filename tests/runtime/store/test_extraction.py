"""Extraction into a store counts the maps that are kept, computed and failed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import ditf
from ditf.calib.images import procedural_image
from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap, not_finite
from ditf.runtime.images import fitted_image
from ditf.runtime.store.extraction import extract
from ditf.runtime.store.feature_store import FeatureStore, StoreIdentity
from ditf.runtime.store.writer import StoreWriter


@pytest.fixture
def images(tmp_path):
    """Five images of different sizes, two of them with the same file name."""
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png", "one/a.png", "two/a.png")]
    for seed, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(procedural_image((40 + 7 * seed, 60), seed)).save(path)
    return paths


def test_stored_maps_match_as_computed_ones(demo_bundle, images, tmp_path):
    points = np.random.default_rng(0).uniform(0, 39, (30, 2))
    with ditf.load(demo_bundle, fit="pad") as model:
        identity = StoreIdentity.of(model.bundle, "pad", None, "float16")
        with StoreWriter(tmp_path / "store", identity) as writer:
            done = extract(model, [*images, images[0]], writer)
            assert (done.computed, done.kept, done.failed, done.loss) == (5, 0, {}, 0.0)
            again = extract(model, images, writer)
            assert (again.computed, again.kept) == (0, 5)
        store = FeatureStore(tmp_path / "store")
        computed = {name: model.features(name) for name in store.names}
        assert len(computed) == 5
        for name, feature_map in computed.items():
            np.testing.assert_array_equal(store[name].array, feature_map.array)
            assert store[name].image_size == feature_map.image_size
            assert store[name].cells == feature_map.cells
        one, other = store.names[0], store.names[-1]
        expected = model.match(computed[one], computed[other], points)
        for found in (
            model.match(store[one], store[other], points),
            model.match(computed[one], store[other], points),
        ):
            np.testing.assert_array_equal(found.points, expected.points)
            np.testing.assert_array_equal(found.scores, expected.scores)
        by_graph = [model.match_with_graph(*maps, points) for maps in (
            (store[one], store[other]), (computed[one], computed[other]),
        )]  # fmt: skip
        np.testing.assert_array_equal(by_graph[0].points, by_graph[1].points)


def test_a_changed_image_is_computed_again(demo_bundle, images, tmp_path):
    with ditf.load(demo_bundle) as model:
        identity = StoreIdentity.of(model.bundle, "stretch", None, "float16")
        with StoreWriter(tmp_path / "store", identity) as writer:
            extract(model, images[:2], writer)
            Image.fromarray(procedural_image((50, 50), 99)).save(images[1])
            done = extract(model, images[:2], writer)
        assert (done.computed, done.kept) == (1, 1)
        expected = model.features(images[1])
    found = FeatureStore(tmp_path / "store")[images[1].as_posix()]
    np.testing.assert_array_equal(found.array, expected.array)
    assert found.image_size == (50, 50)


class OneBadImage:
    """A stand-in for a model whose features of an image of 47 rows are not finite."""

    manifest = SimpleNamespace(batch=3)

    def feeds(self, prompt):
        if prompt is not None:
            raise InputError("this bundle has one condition")

    def fitted(self, path):
        return fitted_image(path, (8, 8))

    def features_of_fitted(self, images, feeds):
        if any(image.image_size[0] == 47 for image in images):
            raise not_finite()
        return [FeatureMap(np.ones((5, 2, 2), np.float16), image.image_size) for image in images]


def test_one_image_does_not_take_its_batch_with_it(images, tmp_path):
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:100])
    paths = [*images[:3], tmp_path / "broken.png", tmp_path / "absent.png", *images[3:]]
    identity = StoreIdentity("f" * 64, "demo", "layer 9", None, "stretch", "float16", 5)
    with StoreWriter(tmp_path / "store", identity) as writer:
        done = extract(OneBadImage(), paths, writer)
    assert done.computed == 4
    names = [path.as_posix() for path in (tmp_path / "broken.png", tmp_path / "absent.png", images[1])]
    assert set(done.failed) == set(names)
    assert "NaN or infinity" in done.failed[names[2]]
    assert set(FeatureStore(tmp_path / "store")) == {p.as_posix() for p in images} - set(names)


def test_a_condition_that_is_not_there_fails_no_image(images, tmp_path):
    identity = StoreIdentity("f" * 64, "demo", "layer 9", "a cat", "stretch", "float16", 5)
    with (
        StoreWriter(tmp_path / "store", identity) as writer,
        pytest.raises(InputError, match="one condition"),
    ):
        extract(OneBadImage(), images, writer, prompt="a cat")


def test_a_file_name_that_is_no_utf_8_fails_alone(demo_bundle, images, tmp_path):
    odd = Path(os.fsdecode(b"\xff\xfe.png"))
    odd = images[0].rename(images[0].with_name(odd.name))
    with ditf.load(demo_bundle) as model:
        identity = StoreIdentity.of(model.bundle, "stretch", None, "float16")
        with StoreWriter(tmp_path / "store", identity) as writer:
            done = extract(model, [odd, *images[1:]], writer)
    assert done.computed == 4
    [reason] = done.failed.values()
    assert "its name is not UTF-8; rename it" in reason
