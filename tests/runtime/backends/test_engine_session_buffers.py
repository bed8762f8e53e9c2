"""Memory of a session, on the stand-in for a GPU."""

from __future__ import annotations

import pytest

from ditf.runtime.backends.cuda import OutOfDeviceMemory
from tests.runtime.backends.engine_plans import (
    LIBRARIES,
    double,
    features_plan,
    match_plan,
    multiply,
    opened,
)
from tests.standin.fixtures import installed
from tests.standin.world import World

pytestmark = pytest.mark.usefixtures("standin_plans")
NO_MEMORY = "cudaErrorMemoryAllocation"


@pytest.mark.parametrize(("library", "full"), LIBRARIES)
def test_after_an_allocation_failed_nothing_refers_to_freed_memory_standin(library, full):
    """Four blocks grow; the one after `passed` others gets no memory, whatever is freed for it."""
    for passed in range(4):
        with installed(World(), full) as world, opened(match_plan(), library) as session:
            for _ in range(3):  # plain, captured, launched
                multiply(session, 3, 4)
            world.fail("cudaMalloc", NO_MEMORY, after=passed, times=100)
            with pytest.raises(OutOfDeviceMemory, match="MB of GPU memory are needed"):
                multiply(session, 60, 50)
            world._failures.clear()
            for h, w in ((3, 4), (60, 50), (3, 4)):
                multiply(session, h, w)
            assert not world.faults


@pytest.mark.parametrize(("library", "full"), LIBRARIES)
def test_other_contexts_are_given_up_when_memory_is_short_standin(library, full):
    with installed(World(), full) as world, opened(match_plan(), library) as session:
        multiply(session, 3, 4)
        world.fail("cudaMalloc", NO_MEMORY, times=2)  # the first attempt, and that after the pool was freed
        multiply(session, 60, 50)
        multiply(session, 3, 4)
        assert not world.faults


@pytest.mark.parametrize(("library", "full"), LIBRARIES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_scratch_memory_where_the_query_by_shapes_gives_none_standin(library, full, dynamic, monkeypatch):
    """Static plans are asked by their engine, and dynamic ones by their profile if the query fails."""
    with installed(World(), full) as world:
        trt = __import__("tensorrt_rtx" if full is None else "tensorrt")
        monkeypatch.setattr(trt.IExecutionContext, "update_device_memory_size_for_shapes", lambda self: 0)
        with opened(features_plan(((1, 200),) if dynamic else ()), library) as session:
            double(session)
        assert not world.faults


def test_a_failed_call_leaves_no_error_for_others_standin():
    """TensorRT asks for CUDA's last error after its kernels, and would take ours for its own."""
    with installed(World()) as world, opened(features_plan()) as session:
        double(session)
        world.fail("cudaMemcpyAsync", "cudaErrorInvalidValue")
        with pytest.raises(Exception, match="cudaErrorInvalidValue"):
            double(session)
        assert world.last_error(reset=False) == "cudaSuccess"
        double(session)
