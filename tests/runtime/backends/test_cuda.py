"""CUDA's runtime API and its errors, on the stand-in for a GPU where a device is needed."""

from __future__ import annotations

import pytest

from ditf.runtime.backends import cuda
from ditf.runtime.errors import DitfError
from tests.standin.fixtures import installed
from tests.standin.world import World


@pytest.fixture
def on_standin():
    with installed(World()) as world:
        opened = cuda.Cuda()
        stream = opened("cudaStreamCreateWithFlags", 1)
        yield world, opened, stream
        opened("cudaStreamDestroy", stream)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, DitfError("refused")])
def test_a_capture_masks_no_error_standin(on_standin, ends, error):
    from ditf.runtime.backends.cuda_streams import capture

    world, opened, stream = on_standin

    def work():
        if not ends:
            world.fail("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated")
        raise error

    with pytest.raises(type(error) if isinstance(error, DitfError) else error):
        capture(opened, stream, work)
    assert not world.graphs


def test_errors_that_only_a_new_process_recovers_from():
    """CUDA's documentation says of each that the process must be started again."""
    from cuda.bindings.runtime import cudaError_t

    documented = {one.name for one in cudaError_t if "relaunched" in (one.__doc__ or "")}
    assert len(documented) > 10
    assert documented <= set(cuda.STICKY)
    assert set(cuda.STICKY) <= {one.name for one in cudaError_t}


def test_a_gpu_that_another_process_has_standin(on_standin):
    world, opened, _ = on_standin
    world.fail("cudaMemGetInfo", "cudaErrorDevicesUnavailable")
    with pytest.raises(DitfError, match="another process has the GPU to itself") as caught:
        opened.memory  # noqa: B018
    assert caught.value.exit_code == 3
