from __future__ import annotations

import os

import numpy as np
import pytest

from ditf.calib.eval.cache import BenchmarkFeatures
from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from tests.calib.eval import miniature


class Extract:
    """Computes toy features and records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompt):
        self.calls.append((len(images), prompt))
        if any((image == 13).all() for image in images):
            return [FeatureMap(np.full((3, 2, 2), np.nan), (9, 9)) for _ in images]
        return [miniature.features(image) for image in images]


@pytest.fixture
def images(tmp_path):
    return [miniature.picture(tmp_path / f"{i}.png", i, (40 + i, 60)) for i in range(4)]


def same(one, other):
    np.testing.assert_array_equal(one.array, other.array)
    assert (one.image_size, one.cells) == (other.image_size, other.cells)
    assert one.array.dtype == other.array.dtype


def test_each_image_once_and_together(images):
    extract = Extract()
    store = BenchmarkFeatures(extract, ["model"])
    first = store.maps([images[0], images[1]])
    second = store.maps([images[1], images[2]])
    assert extract.calls == [(2, None), (1, None)]
    assert second[0] is first[1]
    same(first[0], miniature.features(miniature.pixels(images[0])))
    store.maps([images[0]], "a dog")  # another condition is another map
    assert extract.calls[-1] == (1, "a dog")


def test_a_copy_of_an_image_is_the_same_image(images, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(images[0].read_bytes())
    extract = Extract()
    one, other = BenchmarkFeatures(extract, ["model"]).maps([images[0], copy])
    assert extract.calls == [(1, None)]
    assert one is other


def test_a_later_run_goes_on(images, tmp_path):
    folder = tmp_path / "cache"
    BenchmarkFeatures(Extract(), ["model"], folder).maps(images[:2])
    extract = Extract()
    store = BenchmarkFeatures(extract, ["model"], folder)
    found = store.maps(images[:3])
    assert extract.calls == [(1, None)]
    assert (store.computed, store.read) == (1, 2)
    for features, path in zip(found, images, strict=False):
        same(features, miniature.features(miniature.pixels(path)))
    another = BenchmarkFeatures(Extract(), ["another"], folder)
    another.maps(images[:1])
    assert another.read == 0  # another model's features are not taken


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_damaged_files_are_computed_again(images, tmp_path, content):
    folder = tmp_path / "cache"
    BenchmarkFeatures(Extract(), ["model"], folder).maps(images[:1])
    (path,) = folder.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(content or whole[: len(whole) // 2])
    store = BenchmarkFeatures(Extract(), ["model"], folder)
    same(*store.maps(images[:1]), miniature.features(miniature.pixels(images[0])))
    assert (store.computed, store.read) == (1, 0)
    assert [one.name for one in folder.rglob("*") if one.is_file()] == [
        path.name
    ]  # mended, nothing else left


def test_memory_is_bounded(images):
    extract = Extract()
    size = miniature.features(miniature.pixels(images[0])).array.nbytes
    store = BenchmarkFeatures(extract, ["model"], capacity=2 * size)
    for path in images:
        store.maps([path])
    assert len(extract.calls) == 4
    store.maps(images[2:])  # the last two are still there
    assert len(extract.calls) == 4
    store.maps(images[:1])
    assert len(extract.calls) == 5


def test_features_that_are_not_finite_name_their_image(images, tmp_path):
    from PIL import Image

    bad = tmp_path / "bad.png"
    Image.new("RGB", (20, 20), (13, 13, 13)).save(bad)
    with pytest.raises(InputError, match=r"bad\.png: the features hold NaN"):
        BenchmarkFeatures(Extract(), ["model"]).maps([images[0], bad])


def test_an_image_that_has_gone(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png"):
        BenchmarkFeatures(Extract(), ["model"]).maps([tmp_path / "gone.png"])


def test_a_file_that_is_larger_than_the_memory_for_features_is_computed_again(images, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    BenchmarkFeatures(Extract(), ["model"], folder).maps(images[:1])
    (file,) = folder.glob("*/*.safetensors")
    monkeypatch.setattr("ditf.calib.eval.cache.CAPACITY", file.stat().st_size - 1)
    extract = Extract()
    BenchmarkFeatures(extract, ["model"], folder).maps(images[:1])
    assert extract.calls == [(1, None)]


def test_the_file_of_another_image_or_an_altered_one_is_computed_again(images, tmp_path):
    folder = tmp_path / "cache"
    BenchmarkFeatures(Extract(), ["model"], folder).maps(images[:2])
    one, other = folder.glob("*/*.safetensors")
    one.write_bytes(other.read_bytes())
    other.write_bytes(other.read_bytes()[:-1] + b"\x55")
    extract = Extract()
    BenchmarkFeatures(extract, ["model"], folder).maps(images[:2])
    assert extract.calls == [(2, None)]


def test_an_image_that_is_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="it is a FIFO"):
        BenchmarkFeatures(Extract(), ["model"]).maps([tmp_path / "a.png"])
