"""Engines of whichever TensorRT is installed, on a GPU and on the stand-in, against ONNX Runtime's CPU."""

from __future__ import annotations

import gc
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import ditf
from ditf.calib.images import procedural_images
from ditf.runtime.errors import DitfError, InputError

FLOAT16_ERROR = 5e-3  # of features of unit scale: another order of summation in float16 products


def test_features_and_matches(model, reference):
    images = procedural_images((120, 160), 4)
    points = np.random.default_rng(0).uniform((0, 0), (159, 119), (40, 2))
    mine, other = model.features_of(images), reference.features_of(images)
    assert all(one.resident is not None for one in mine)
    for a, b in zip(mine, other, strict=True):
        np.testing.assert_allclose(a.array, b.array, atol=FLOAT16_ERROR * np.abs(b.array).max())
    found, expected = model.match(mine[0], mine[1], points), reference.match(other[0], other[1], points)
    assert (np.abs(found.points - expected.points).max(axis=1) <= 1).mean() > 0.9


@pytest.mark.parametrize(("source", "target"), [((1200, 1600), (900, 700)), ((64, 2048), (2048, 64))])
def test_matches_at_large_sizes(model, reference, source, target):
    """Both sides of the profile's limit; the second match runs at other shapes than the first one."""
    images = [procedural_images(size, 1)[0] for size in (source, target)]
    points = np.random.default_rng(0).uniform((0, 0), (source[1] - 1, source[0] - 1), (20, 2))
    for _ in range(2):
        mine, other = [[opened.features(image) for image in images] for opened in (model, reference)]
        found, expected = model.match(*mine, points), reference.match(*other, points)
        cell = max(target) / min(other[1].grid)
        assert (np.abs(found.points - expected.points).max(axis=1) <= cell / 4).mean() > 0.9
        images.reverse()
        points = np.clip(points, 0, min(images[0].shape[:2]) - 1)
        source, target = target, source


def test_parity_with_pytorch(ditf, model, machine):
    done = ditf("check", model.bundle.path, "--backend", machine.backend)
    assert done.returncode == 0, done.stderr


def test_graphs_give_what_the_first_run_gave(model):
    image = procedural_images((120, 160), 1)[0]
    runs = [model.features(image).array for _ in range(4)]  # plain, captured, launched, launched
    for one in runs[1:]:
        np.testing.assert_array_equal(one, runs[0])


def test_the_same_from_four_threads(model):
    images = procedural_images((120, 160), 6)
    alone = [model.features(image).array for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: model.features(image).array, images * 3))
    for index, one in enumerate(together):
        np.testing.assert_array_equal(one, alone[index % len(images)])


def test_a_failed_call_ends_nothing(model):
    image = procedural_images((120, 160), 1)[0]
    expected = model.features(image).array
    with pytest.raises(InputError, match="was not built for"):
        model.run(np.zeros((1, 8, 8, 3), np.uint8))
    np.testing.assert_array_equal(model.features(image).array, expected)


def test_maps_outlive_the_model(opened, demo_bundle):
    with opened(demo_bundle) as model:
        features = model.features(procedural_images((120, 160), 1)[0])
    gc.collect()
    assert np.isfinite(features.array).all()
    with pytest.raises(RuntimeError, match="closed"):
        model.features(procedural_images((120, 160), 1)[0])


@pytest.mark.parametrize("batch", [((1, 2, 4),), ((1,), (4,))])
def test_batches(opened, pixart_bundle, batch):
    images = procedural_images((48, 80), 5)
    with opened(pixart_bundle, batch) as model, ditf.load(pixart_bundle, "onnxruntime") as other:
        for mine, expected in zip(model.features_of(images), other.features_of(images), strict=True):
            scale = np.abs(expected.array).max()
            np.testing.assert_allclose(mine.array, expected.array, atol=FLOAT16_ERROR * scale)


def test_a_truncated_plan_is_not_deserialised(machine, built, demo_bundle, tmp_path):
    copy = shutil.copytree(built(demo_bundle), tmp_path / "bundle")
    plan = next(copy.glob("engines/*/features.plan"))
    plan.write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(DitfError, match="truncated"):
        ditf.load(copy, machine.backend)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
def test_bench(ditf, model, machine, tmp_path):
    """On the stand-in its figures mean nothing, and PyTorch has no GPU to be compared on."""
    against = "onnxruntime" if machine.world is not None else "eager,compile,onnxruntime"
    done = ditf(
        "bench", model.bundle.path, "--seconds", "0.5", "--against", against, "--json", tmp_path / "b.json",
        "--backend", machine.backend,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "features, GPU" in json.loads((tmp_path / "b.json").read_text())["rows"]
