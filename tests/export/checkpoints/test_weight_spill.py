"""Weights in a file: the same values, few pages of memory, and nothing left behind."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditf.export.checkpoints import weight_spill
from ditf.export.checkpoints.weight_spill import SMALLEST, rest, resting, spilling
from ditf.export.graph.blocks.layers import constant
from ditf.runtime.errors import InputError

LARGE = (SMALLEST // 4 // 64, 64)


def mapped_bytes():
    """Pages of files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))


def descriptors():
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    transposed=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_values_and_layout_are_those_of_a_copy(tmp_path_factory, shape, dtype, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(-9, 9, shape, generator=generator).to(dtype)
    tensor = tensor.T if transposed and tensor.ndim == 2 else tensor
    with pytest.MonkeyPatch.context() as patch, spilling(tmp_path_factory.getbasetemp()) as file:
        patch.setattr(weight_spill, "SMALLEST", 0)
        kept = [constant(tensor), constant(tensor + 1)]
        file.rest()
        for parameter, expected in zip(kept, (tensor, tensor + 1), strict=True):
            assert torch.equal(parameter, expected)
            assert parameter.is_contiguous()
            assert parameter.dtype == dtype
        assert file.written > 0


def test_a_change_in_place_survives(tmp_path):
    with spilling(tmp_path):
        weight = constant(torch.ones(LARGE))
        weight.data.div_(4)
        rest()
        assert torch.equal(weight, torch.full(LARGE, 0.25))
    assert float(weight.sum()) == weight.numel() / 4  # a tensor outlives its file


def test_only_what_is_large_goes_to_the_file(tmp_path):
    with spilling(tmp_path) as file:
        constant(torch.ones(10))
        constant(torch.empty(LARGE, device="meta"))
        assert file.written == 0
        constant(torch.ones(LARGE))
        assert file.written == SMALLEST
    constant(torch.ones(LARGE))
    assert file.written == SMALLEST


def test_the_file_has_no_name(tmp_path):
    """So that a killed process leaves nothing."""
    with spilling(tmp_path):
        constant(torch.ones(LARGE))
        assert not list(tmp_path.iterdir())


def test_pages_are_given_back(tmp_path):
    count = 64
    with spilling(tmp_path):
        weights = [constant(torch.ones(LARGE)) for _ in range(count)]
        x = torch.ones(1, LARGE[0])
        before = mapped_bytes()
        sums = [float((x @ weight).sum()) for weight in weights]
        assert mapped_bytes() - before > count * SMALLEST // 2  # or the test shows nothing
        with resting():
            assert [float((x @ weight).sum()) for weight in weights] == sums
        assert mapped_bytes() - before < count * SMALLEST // 4


def test_many_tensors_take_few_descriptors(tmp_path, monkeypatch):
    """Of mappings that are too small for all, and of a tensor that is larger than one."""
    monkeypatch.setattr(weight_spill, "_SEGMENT", 5 * SMALLEST)
    before = descriptors()
    with spilling(tmp_path) as file:
        weights = [constant(torch.full(LARGE, float(index))) for index in range(20)]
        weights.append(constant(torch.full((6, *LARGE), 20.0)))
        weights.append(constant(torch.full(LARGE, 21.0)))
        assert file.written == 27 * SMALLEST
        assert descriptors() - before <= 1 + 4 + 1 + 1
        file.rest()
        assert [float(weight.mean()) for weight in weights] == list(range(22))
    del weights
    assert descriptors() == before


def test_progress_is_in_bytes(tmp_path):
    seen = []
    with spilling(tmp_path, seen.append):
        for _ in range(3):
            constant(torch.ones(LARGE))
    assert seen == [SMALLEST, 2 * SMALLEST, 3 * SMALLEST]


def test_no_room(tmp_path):
    """A limit on file size stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written .*; free some space"), spilling(tmp_path):
            constant(torch.ones(LARGE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
