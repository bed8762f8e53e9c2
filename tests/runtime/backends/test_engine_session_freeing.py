"""What a session frees, and when, on the stand-in for a GPU."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from ditf.runtime.backends.cuda import open_cuda
from ditf.runtime.errors import DitfError
from tests.runtime.backends.engine_plans import (
    FULL,
    LIBRARIES,
    RTX,
    double,
    features_plan,
    open_plan,
    opened,
)
from tests.standin.fixtures import installed
from tests.standin.world import DeviceModel, World

pytestmark = pytest.mark.usefixtures("standin_plans")
FREEING = (
    "cudaFree", "cudaFreeHost", "cudaEventDestroy", "cudaStreamDestroy", "cudaGraphExecDestroy",
    "cudaSetDevice", "cudaStreamSynchronize",
)  # fmt: skip
OPENING = [
    ("cudaStreamCreateWithFlags", 0), ("cudaEventCreate", 0), ("cudaEventCreate", 1), ("cudaMemGetInfo", 0),
    ("deserialize_cuda_engine", 0),
]  # fmt: skip


@pytest.mark.parametrize(("library", "full"), LIBRARIES)
def test_a_session_that_is_dropped_frees_everything_standin(library, full, tmp_path):
    with installed(World(), full) as world:
        session = open_plan(features_plan(), library, tmp_path / "ditf" / "kernels" / "a.cache")
        for seed in range(3):
            double(session, seed)
        del session
        assert not world.alive()
        assert not world.faults


@pytest.mark.parametrize(("name", "after"), OPENING)
def test_a_failed_opening_frees_everything_standin(name, after):
    """While the exception is still alive, and with it what its traceback refers to."""
    with installed(World()) as world:
        world.fail(name, "cudaErrorInvalidValue", after)
        with pytest.raises(DitfError) as caught:
            open_plan(features_plan())
        assert not world.alive()
        assert caught.value.fix
        with opened(features_plan()) as session:
            double(session)


def test_close_goes_on_after_an_error_standin(caplog):
    """Of each session, at most the thing whose call failed is left."""
    with installed(World(), "11.4.0.106") as world:
        for count, name in enumerate(FREEING, 1):
            session = open_plan(features_plan(), FULL)
            for seed in range(3):
                double(session, seed)
            world.fail(name, "cudaErrorInvalidValue")
            with caplog.at_level(logging.WARNING):
                session.close()
                session.close()
            assert caplog.text.count("is not all freed") == count, name
            assert len(world.alive()) <= count, name
            with pytest.raises(RuntimeError, match="closed"):
                double(session)


def test_close_without_a_kernel_cache_to_write_standin(tmp_path):
    with installed(World()) as world:
        world.fail("IRuntimeCache.serialize", times=9)
        with opened(features_plan(), RTX, tmp_path / "ditf" / "kernels" / "a.cache") as session:
            double(session)
        assert not world.alive()


def test_close_masks_no_error_standin():
    with installed(World()) as world:
        world.fail("cudaStreamDestroy", "cudaErrorInvalidValue")
        with pytest.raises(ZeroDivisionError), opened(features_plan()):
            raise ZeroDivisionError


def test_kept_arrays_outlive_the_session_and_are_freed_standin():
    with installed(World()) as world:
        with opened(features_plan()) as session:
            image = np.ones((1, 4, 6, 3), np.uint8)
            kept = session.run({"image": image}, keep=["features"])["features"]
        np.testing.assert_array_equal(kept.numpy(), 2.0 * image)
        assert len(world.alive()) == 1
        del kept
        assert not world.alive()
        assert not world.faults


@pytest.mark.parametrize("name", ["cudaStreamSynchronize", "execute_async_v3"])
def test_a_gpu_that_failed_standin(name, caplog):
    """After a sticky error the process must be started again; opening the bundle again does not help."""
    with installed(World()) as world, caplog.at_level(logging.WARNING):
        session = open_plan(features_plan())
        double(session)
        world.fail(name, "cudaErrorIllegalAddress")
        world.remember("cudaErrorIllegalAddress", sticky=True)
        for _ in range(2):
            with pytest.raises(DitfError, match=r"^the GPU failed \(cudaErrorIllegalAddress") as caught:
                double(session)
            assert "start the process again" in caught.value.fix
        session.close()
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_the_device_is_that_of_the_session_in_every_thread_standin():
    """`World.device` is the calling thread's current device; another library may have changed it."""
    with installed(World([DeviceModel(), DeviceModel()])) as world:
        session = open_plan(features_plan())
        for seed in range(3):
            world.device = 1
            double(session, seed)
        dropped = open_plan(features_plan())
        double(dropped)
        world.device = 1
        session.close()
        world.device = 1
        del dropped
        assert not world.faults
        assert not world.alive()


def test_a_session_on_another_device_standin():
    with installed(World([DeviceModel(), DeviceModel()])) as world:
        with opened(features_plan(), device=1) as session:
            double(session)
            assert not world.memory.used[0]
        assert not world.faults
        with pytest.raises(DitfError, match="there is no cuda:2, the last device is cuda:1"):
            open_plan(features_plan(), device=2)
        assert open_cuda(1) is open_cuda(1)
