"""Engines on the GPU that is here, built by whichever TensorRT is installed, against ONNX Runtime's CPU."""

from __future__ import annotations

import gc
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import ditf
from ditf.calib.images import procedural_images
from ditf.engines.build import build
from ditf.engines.compile import BuildOptions
from ditf.runtime.backends.flavour import choose_flavour
from ditf.runtime.backends.gpu import find_gpu
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.errors import DitfError, InputError, MissingComponent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA driver answers: engines are built, not run"),
]
FLOAT16_ERROR = 5e-3  # of features of unit scale: another order of summation in float16 products


def built(source, folder, batch=()):
    """A copy of a bundle with an engine for this GPU, opened."""
    try:
        flavour, trt = choose_flavour("auto")
    except MissingComponent as error:
        pytest.skip(str(error))
    bundle = Bundle.open(shutil.copytree(source, folder / "bundle"))
    target = None if flavour.name == "tensorrt" else "portable"
    build(bundle, flavour, trt, BuildOptions(target), batch)
    return ditf.load(bundle.path, flavour.name)


@pytest.fixture
def model(demo_bundle, tmp_path):
    with built(demo_bundle, tmp_path) as opened:
        yield opened


@pytest.fixture
def reference(demo_bundle):
    with ditf.load(demo_bundle, "onnxruntime") as opened:
        yield opened


def test_features_and_matches(model, reference):
    images = procedural_images((120, 160), 4)
    points = np.random.default_rng(0).uniform((0, 0), (159, 119), (40, 2))
    mine, other = model.features_of(images), reference.features_of(images)
    assert all(one.resident is not None for one in mine)
    for a, b in zip(mine, other, strict=True):
        np.testing.assert_allclose(a.array, b.array, atol=FLOAT16_ERROR * np.abs(b.array).max())
    found, expected = model.match(mine[0], mine[1], points), reference.match(other[0], other[1], points)
    assert (np.abs(found.points - expected.points).max(axis=1) <= 1).mean() > 0.9


def test_parity_with_pytorch(ditf, model):
    done = ditf("check", model.bundle.path, "--backend", model.backend)
    assert done.returncode == 0, done.stderr


def test_graphs_give_what_the_first_run_gave(model):
    image = procedural_images((120, 160), 1)[0]
    runs = [model.features(image).array for _ in range(4)]  # plain, captured, launched, launched
    for one in runs[1:]:
        np.testing.assert_array_equal(one, runs[0])


def test_nothing_is_allocated_once_it_is_warm(model):
    images = procedural_images((120, 160), 4)
    source = model.features(images[0])
    held = []
    for index in range(200):
        model.match(source, model.features(images[index % 4]), [(10, 10)] * 16)
        if index > 20:
            held.append(model.device_bytes())
    assert len(set(held)) == 1


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


def test_maps_outlive_the_model(demo_bundle, tmp_path):
    with built(demo_bundle, tmp_path) as model:
        features = model.features(procedural_images((120, 160), 1)[0])
    gc.collect()
    assert np.isfinite(features.array).all()
    with pytest.raises(RuntimeError, match="closed"):
        model.features(procedural_images((120, 160), 1)[0])


@pytest.mark.parametrize("batch", [[(1, 2, 4)], [(1,), (4,)]])
def test_batches(pixart_bundle, tmp_path, batch):
    images = procedural_images((48, 80), 5)
    with built(pixart_bundle, tmp_path, batch) as model, ditf.load(pixart_bundle, "onnxruntime") as other:
        for mine, expected in zip(model.features_of(images), other.features_of(images), strict=True):
            scale = np.abs(expected.array).max()
            np.testing.assert_allclose(mine.array, expected.array, atol=FLOAT16_ERROR * scale)


def test_too_little_memory_says_how_much(model):
    from ditf.runtime.backends.cuda import OutOfDeviceMemory, open_cuda

    with pytest.raises(OutOfDeviceMemory, match=r"MB of GPU memory are needed, [\d.]+ MB are free"):
        open_cuda(0).allocate(1 << 50)
    model.features(procedural_images((120, 160), 1)[0])


def test_a_truncated_plan_is_not_deserialised(demo_bundle, tmp_path):
    with built(demo_bundle, tmp_path) as model:
        folder = next((model.bundle.path / "engines").iterdir())
        backend, path = model.backend, model.bundle.path
    plan = folder / "features.plan"
    plan.write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(DitfError, match="truncated"):
        ditf.load(path, backend)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
def test_bench(ditf, model, tmp_path):
    done = ditf(
        "bench", model.bundle.path, "--seconds", "0.5", "--against", "eager,compile,onnxruntime",
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "features, GPU" in json.loads((tmp_path / "b.json").read_text())["rows"]
