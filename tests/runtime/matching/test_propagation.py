"""Label propagation against a slow, direct PyTorch version of DINO's eval_video_segmentation.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching import propagation
from ditf.runtime.matching.propagation import Propagator
from tests.runtime.maps import random_map

TOLERANCE = 1e-5
"""The tolerance of probabilities: cosines are off by 1e-7, temperatures go down to 0.01, frames add up."""


class Published:
    """Compare every cell with every cell of every frame in float64, and mask afterwards."""

    def __init__(self, first, labels, n_last=7, radius=12, top_k=5, temperature=0.1, factor=16):
        self.options = (n_last, radius, top_k, temperature, factor)
        h, w = first.grid
        small = np.array(Image.fromarray(labels).resize((w, h), Image.Resampling.NEAREST))
        one_hot = (
            functional.one_hot(torch.from_numpy(small).long(), max(2, int(small.max()) + 1))
            .permute(2, 0, 1)
            .double()
        )
        self.first, self.queue = (self.cells(first), one_hot), []

    @staticmethod
    def cells(features):
        return torch.from_numpy(features.array.astype(np.float64)).flatten(1)

    def update(self, frame):
        n_last, radius, top_k, temperature, factor = self.options
        h, w = frame.grid
        target = self.cells(frame)
        queries = functional.normalize(target.T, dim=1)
        y, x = np.indices((h, w)).reshape(2, -1)
        far = (abs(y[:, None] - y) > radius) | (abs(x[:, None] - x) > radius)
        affinities, known = [], []
        for cells, seg in [self.first, *self.queue]:
            affinity = torch.exp(queries @ functional.normalize(cells, dim=0) / temperature)
            if radius:
                affinity[torch.from_numpy(far)] = 0
            affinities.append(affinity)
            known.append(seg.flatten(1))
        affinity = torch.cat(affinities, dim=1)
        lowest = affinity.topk(min(top_k, affinity.shape[1]), dim=1).values[:, -1:]
        affinity[affinity < lowest] = 0
        affinity /= affinity.sum(dim=1, keepdim=True)
        seg = (torch.cat(known, dim=1) @ affinity.T).reshape(-1, h, w)
        self.queue = ([*self.queue, (target, seg)])[max(0, len(self.queue) + 1 - n_last) :] if n_last else []
        self.probabilities = seg
        up = functional.interpolate(seg[None], scale_factor=factor, mode="bilinear", align_corners=False)[0]
        spread = 1.0
        for one in up:
            if one.max() > 0:
                one -= one.min().clone()
                spread = min(spread, float(one.max()))
                one /= one.max().clone()
        # If two labels are level to within the tolerance of the probabilities, rounding decides.
        first, second = up.topk(2, dim=0).values
        self.certain = resized((first - second > 4 * TOLERANCE / max(spread, 1e-9)).numpy(), frame)
        decided = up.argmax(dim=0).numpy().astype(np.uint8)
        return resized(decided, frame)


def resized(picture: np.ndarray, frame: FeatureMap) -> np.ndarray:
    """Resize to a frame's image by the nearest pixel."""
    size = (frame.image_size[1], frame.image_size[0])
    image = Image.fromarray(picture.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.array(image).astype(picture.dtype)


def video(seed: int, shape: tuple[int, int, int], size: tuple[int, int], frames: int) -> list[FeatureMap]:
    """A scene with noise that moves by one cell per frame."""
    rng = np.random.default_rng(seed)
    scene = rng.standard_normal(shape)
    return [
        FeatureMap(
            (np.roll(scene, (i // 2, i), axis=(1, 2)) + 0.7 * rng.standard_normal(shape)).astype(np.float32),
            size,
        )
        for i in range(frames)
    ]


def blobs(seed: int, size: tuple[int, int], values: list[int]) -> np.ndarray:
    """A picture of labels with a wide area for each label."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(values, (5, 6)).astype(np.uint8)
    return np.array(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.NEAREST))


def assert_published(frames: list[FeatureMap], labels: np.ndarray, **options) -> float:
    """The share of pixels that rounding does not decide."""
    shares = []
    ours, theirs = Propagator(frames[0], labels, **options), Published(frames[0], labels, **options)
    present = ours.labels
    for frame in frames[1:]:
        got, expected = ours.update(frame), theirs.update(frame)
        probabilities = theirs.probabilities.numpy().transpose(1, 2, 0)[..., present]
        if ours._last:
            np.testing.assert_allclose(ours._last[-1][1], probabilities, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(got[theirs.certain], expected[theirs.certain])
        shares.append(theirs.certain.mean())
        assert got.dtype == np.uint8
    return float(np.mean(shares))


CASES = {
    "defaults": ((24, 30, 40), (240, 320), {}),
    "queue-overflows": ((24, 9, 11), (72, 88), {"n_last": 2, "radius": 3}),
    "no-queue": ((24, 9, 11), (72, 88), {"n_last": 0, "radius": 3}),
    "no-radius": ((24, 15, 20), (72, 88), {"radius": 0}),
    "radius-1": ((24, 15, 20), (72, 88), {"radius": 1, "n_last": 1, "top_k": 20}),
    "radius-of-the-map": ((24, 6, 7), (50, 61), {"radius": 50}),
    "top-1": ((24, 14, 13), (72, 88), {"top_k": 1, "radius": 4}),
    "top-all": ((24, 6, 7), (50, 61), {"top_k": 999, "radius": 0}),
    "temperature": ((24, 14, 13), (72, 88), {"temperature": 0.01, "radius": 4}),
    "factor": ((24, 14, 13), (72, 88), {"factor": 5, "radius": 4}),
    "one-cell": ((24, 1, 1), (9, 8), {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_published_protocol(case):
    shape, size, options = case
    certain = assert_published(video(0, shape, size, 5), blobs(1, size, [0, 1, 2, 7]), **options)
    assert certain > 0.99 or shape[1:] == (1, 1)


def test_ties_with_the_last_of_the_top_are_taken_in():
    # The first frame has four equal cells, all within reach. Signs over sixteen channels have exact cosines.
    tile = np.sign(np.random.default_rng(0).standard_normal((16, 4, 4))).astype(np.float32)
    frame = FeatureMap(np.tile(tile, (1, 2, 2)), (8, 8))
    assert assert_published([frame, frame, frame], blobs(2, (8, 8), [0, 3]), top_k=2) > 0.3


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 99),
    cells=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    radius=st.integers(0, 6),
    n_last=st.integers(0, 3),
)
def test_any_grid(seed, cells, radius, n_last):
    frames = video(seed, (24, *cells), (40, 50), 4)
    assert_published(frames, blobs(seed, (40, 50), [0, 1, 2]), radius=radius, n_last=n_last)


@pytest.mark.parametrize("block", [1, 5, 100])
def test_blocks_change_nothing(monkeypatch, block):
    frames, labels = video(0, (24, 17, 19), (68, 76), 3), blobs(1, (68, 76), [0, 1, 2])
    whole = [Propagator(frames[0], labels, radius=4).update(frame) for frame in frames[1:]]
    monkeypatch.setattr(propagation, "_BLOCK", block)
    blocked = [Propagator(frames[0], labels, radius=4).update(frame) for frame in frames[1:]]
    np.testing.assert_array_equal(np.stack(blocked), np.stack(whole))


def test_a_picture_that_stands_still_keeps_its_labels():
    frame = random_map(0, (64, 12, 16), (96, 128))
    labels = np.zeros((96, 128), np.uint8)
    labels[24:72, 32:96] = 5
    propagator = Propagator(frame, labels, temperature=0.01)
    for _ in range(10):
        got = propagator.update(frame)
    assert (got == labels).mean() > 0.98  # borders between labels are those of an upsampled map


def test_all_two_hundred_and_fifty_six_labels():
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    frame = random_map(0, (64, 16, 16), (16, 16))
    propagator = Propagator(frame, labels, temperature=0.01, factor=1)
    np.testing.assert_array_equal(propagator.labels, np.arange(256))
    np.testing.assert_array_equal(propagator.update(frame), labels)


def test_one_label():
    frames = video(0, (8, 5, 6), (20, 24), 2)
    np.testing.assert_array_equal(Propagator(frames[0], np.full((20, 24), 9, np.uint8)).update(frames[1]), 9)


def test_equal_features():
    constant = FeatureMap(np.ones((4, 6, 6), np.float32), (12, 12))
    assert_published([constant, constant], np.zeros((12, 12), np.uint8))


def test_tiny_temperature_does_not_overflow():
    frames = video(0, (24, 9, 11), (72, 88), 3)
    propagator = Propagator(frames[0], blobs(1, (72, 88), [0, 1]), temperature=1e-6)
    assert {*np.unique(propagator.update(frames[1]))} <= {0, 1}


def test_frames_of_other_image_sizes():
    first, second = video(0, (24, 9, 11), (72, 88), 2)
    other = FeatureMap(second.array, (36, 50))
    assert Propagator(first, blobs(1, (72, 88), [0, 1])).update(other).shape == (36, 50)


def test_padded_maps():
    first = FeatureMap(random_map(0, (16, 5, 6), (1, 1)).array, (45, 60), (4.5, 6.0))
    labels = np.zeros((45, 60), np.uint8)
    labels[20:] = 1
    assert Propagator(first, labels, temperature=0.01).update(first).shape == (45, 60)


def test_memory_does_not_grow():
    frames = video(0, (24, 9, 11), (72, 88), 20)
    propagator = Propagator(frames[0], blobs(1, (72, 88), [0, 1]), n_last=3)
    for frame in frames[1:]:
        propagator.update(frame)
    assert len(propagator._last) == 3


@pytest.mark.parametrize(
    ("labels", "options", "problem"),
    [
        (np.zeros((9, 12), np.uint8), {}, r"must be uint8 \[10, 12\], as the frame, got uint8 \[9, 12\]"),
        (np.zeros((10, 12), np.int64), {}, "got int64"),
        (np.zeros((10, 12, 1), np.uint8), {}, r"got uint8 \[10, 12, 1\]"),
        (np.zeros((10, 12), np.uint8), {"n_last": -1}, "n_last is -1; it is 0 or more"),
        (np.zeros((10, 12), np.uint8), {"radius": -1}, "radius is -1"),
        (np.zeros((10, 12), np.uint8), {"top_k": 0}, "top_k is 0"),
        (np.zeros((10, 12), np.uint8), {"factor": 0}, "factor is 0"),
        (np.zeros((10, 12), np.uint8), {"temperature": 0}, "temperature is 0"),
        (np.zeros((10, 12), np.uint8), {"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_bad_input_is_refused(labels, options, problem):
    with pytest.raises(InputError, match=problem):
        Propagator(random_map(0, (8, 3, 3), (10, 12)), labels, **options)


@pytest.mark.parametrize("shape", [(8, 3, 4), (9, 3, 3)])
def test_another_frame_is_refused(shape):
    propagator = Propagator(random_map(0, (8, 3, 3), (10, 12)), np.zeros((10, 12), np.uint8))
    with pytest.raises(InputError, match="one size and one bundle"):
        propagator.update(random_map(1, shape, (10, 12)))
