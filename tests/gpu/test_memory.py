"""Memory of the GPU, by the driver's own count, on a GPU and on the stand-in."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import ditf
from ditf.calib.images import procedural_images
from ditf.runtime.backends.cuda import OutOfDeviceMemory, open_cuda

SMALL = 96 << 20  # bytes of the stand-in's memory where a test fills it


def use(model):
    """Features of an image and a match."""
    features = model.features(procedural_images((120, 160), 1)[0])
    return model.match(features, features, [(10, 10)] * 16)


@pytest.fixture
def all_taken(machine):
    """Call it to take the GPU's free memory; what it returns gives the memory back."""
    from cuda.bindings import runtime

    held = []

    def give_back():
        while held:
            assert runtime.cudaFree(held.pop())[0].name == "cudaSuccess"

    def take():
        size = 1 << 36
        while size >= 256:
            error, address = runtime.cudaMalloc(size)
            if error.name == "cudaSuccess":
                held.append(address)
            else:
                runtime.cudaGetLastError()
                size //= 2
        return give_back

    if machine.world is not None:
        machine.world.memory.totals[0] = SMALL
    yield take
    give_back()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_all_memory_comes_back(machine, built, demo_bundle, end):
    def free_after():
        model = ditf.load(built(demo_bundle), machine.backend)
        before = machine.free_bytes
        use(model)
        assert before - machine.free_bytes + machine.slack >= model.device_bytes() > 0
        if end == "close":
            model.close()
        del model
        gc.collect()
        return machine.free_bytes

    first = free_after()  # the driver keeps what it loaded for the first model
    assert min(free_after() for _ in range(3)) >= first - machine.slack


def test_nothing_is_allocated_once_it_is_warm(machine, model):
    images = procedural_images((120, 160), 4)
    source = model.features(images[0])
    held, free = [], []
    for index in range(60):
        model.match(source, model.features(images[index % 4]), [(10, 10)] * 16)
        if index > 20:
            held.append(model.device_bytes())
            free.append(machine.free_bytes)
    assert len(set(held)) == 1
    assert max(free) - min(free) <= machine.slack


def test_too_little_memory_says_how_much(model):
    with pytest.raises(OutOfDeviceMemory, match=r"MB of GPU memory are needed, [\d.]+ MB are free"):
        open_cuda(0).allocate(1 << 50)
    use(model)


def test_a_model_works_again_when_memory_is_there_again(model, reference, all_taken):
    image, large = procedural_images((120, 160), 1)[0], procedural_images((1500, 2000), 1)[0]
    features = model.features(image)
    wide, expected = model.features(large), features.array
    points = [(5, 7)] * 3
    give_back = all_taken()
    with pytest.raises(OutOfDeviceMemory):
        model.match(wide, wide, points)
    give_back()
    found = model.match(wide, wide, points)
    other = reference.features(large)
    assert np.abs(found.points - reference.match(other, other, points).points).max() <= 1
    np.testing.assert_array_equal(model.features(image).array, expected)


def test_a_model_that_does_not_fit(machine, built, demo_bundle, all_taken):
    path = built(demo_bundle)
    with ditf.load(path, machine.backend) as first:
        use(first)
        give_back = all_taken()
        with pytest.raises(OutOfDeviceMemory):
            ditf.load(path, machine.backend)
        give_back()
        free = machine.free_bytes
        with ditf.load(path, machine.backend) as second:
            use(second)
        gc.collect()
        assert machine.free_bytes >= free - machine.slack
        use(first)
