"""The stand-in for a GPU judges other tests: each of its rules is broken here, and it must notice."""

from __future__ import annotations

import gc
import inspect
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.standin.cuda_runtime import FUNCTIONS
from tests.standin.world import World

DEFAULT, TO_DEVICE, TO_HOST = 4, 1, 2


@pytest.fixture
def cuda(breakable_standin):
    from cuda.bindings import runtime

    return runtime


def call(cuda, name, *arguments):
    """The results of a call that works."""
    error, *values = getattr(cuda, name)(*arguments)
    assert error.name == "cudaSuccess", (name, error.name)
    return values[0] if values else None


def error_of(cuda, name, *arguments):
    return getattr(cuda, name)(*arguments)[0].name


def test_every_function_is_one_of_the_real_module(cuda):
    real = cuda.__standin__
    for name in FUNCTIONS:
        assert callable(getattr(real, name)), name
    assert cuda.cudaError_t is real.cudaError_t


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_called_as_the_real_ones_and_return_as_many_results(cuda, breakable_standin, name):
    """The real module documents its results; those of a call that failed are None."""
    real = getattr(cuda.__standin__, name)
    mine, other = (list(inspect.signature(one).parameters) for one in (getattr(cuda, name), real))
    assert mine == other
    with pytest.raises(TypeError):
        getattr(cuda, name)(*[0] * (len(other) + 1))
    _, _, returned = real.__doc__.partition("Returns\n-------\n")  # cudaMemcpy's says nothing
    results = re.findall(r"^\w+ : ", returned.split("\n\n")[0], re.MULTILINE)
    breakable_standin.fail(name, "cudaErrorUnknown")
    error, *values = getattr(cuda, name)(*[0] * len(other))
    assert error.name == "cudaErrorUnknown"
    assert values == [None] * len(results)


def test_the_host_cannot_read_device_memory(cuda, breakable_standin):
    address = call(cuda, "cudaMalloc", 64)
    spans = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
    rights = [
        right for span, right in spans
        if int(span.split("-")[0], 16) <= address < int(span.split("-")[1], 16)
    ]  # fmt: skip
    assert rights == ["---p"]


def test_new_memory_is_poisoned_and_a_copy_is_checked(cuda, breakable_standin):
    address = call(cuda, "cudaMalloc", 64)
    host = np.zeros(16, np.float32)
    call(cuda, "cudaMemcpy", host.ctypes.data, address, 64, TO_HOST)
    assert np.isnan(host).all()
    assert error_of(cuda, "cudaMemcpy", host.ctypes.data, address, 65, TO_HOST) == "cudaErrorIllegalAddress"
    assert breakable_standin.faults
    assert error_of(cuda, "cudaMalloc", 4) == "cudaErrorIllegalAddress"  # sticky


def test_nothing_runs_before_it_is_waited_for(cuda, breakable_standin):
    stream = call(cuda, "cudaStreamCreateWithFlags", 1)
    address, pinned = call(cuda, "cudaMalloc", 64), call(cuda, "cudaHostAlloc", 64, 0)
    call(cuda, "cudaMemsetAsync", address, 7, 64, stream)
    call(cuda, "cudaMemcpyAsync", pinned, address, 64, DEFAULT, stream)
    host = np.zeros(64, np.uint8)
    call(cuda, "cudaMemcpy", host.ctypes.data, address, 64, TO_HOST)
    assert (host == 255).all()  # the default stream does not wait for a non-blocking one
    assert error_of(cuda, "cudaStreamQuery", stream) == "cudaErrorNotReady"
    call(cuda, "cudaStreamSynchronize", stream)
    call(cuda, "cudaMemcpy", host.ctypes.data, address, 64, TO_HOST)
    assert (host == 7).all()


def test_events_are_not_ready_before_their_stream_was_waited_for(cuda):
    stream = call(cuda, "cudaStreamCreateWithFlags", 1)
    events = [call(cuda, "cudaEventCreate") for _ in range(2)]
    assert error_of(cuda, "cudaEventElapsedTime", *events) == "cudaErrorInvalidResourceHandle"
    for event in events:
        call(cuda, "cudaEventRecord", event, stream)
    assert error_of(cuda, "cudaEventElapsedTime", *events) == "cudaErrorNotReady"
    call(cuda, "cudaStreamSynchronize", stream)
    assert call(cuda, "cudaEventElapsedTime", *events) >= 0


def test_asynchronous_copies_need_pinned_memory(cuda, breakable_standin):
    stream, address = call(cuda, "cudaStreamCreate"), call(cuda, "cudaMalloc", 64)
    host = np.zeros(64, np.uint8)
    error = error_of(cuda, "cudaMemcpyAsync", address, host.ctypes.data, 64, DEFAULT, stream)
    assert error == "cudaErrorInvalidValue"
    assert "page-locked" in breakable_standin.faults[0]


def test_page_locked_memory_is_not_freed_before_its_copy_ran(cuda, breakable_standin):
    stream, address = call(cuda, "cudaStreamCreate"), call(cuda, "cudaMalloc", 64)
    pinned = call(cuda, "cudaHostAlloc", 64, 0)
    call(cuda, "cudaMemcpyAsync", address, pinned, 64, DEFAULT, stream)
    call(cuda, "cudaFreeHost", pinned)
    assert error_of(cuda, "cudaStreamSynchronize", stream) == "cudaErrorIllegalAddress"
    assert "freed before it ran" in breakable_standin.faults[0]


def test_registered_memory_is_page_locked_until_it_is_given_back(cuda, breakable_standin):
    stream, address = call(cuda, "cudaStreamCreate"), call(cuda, "cudaMalloc", 64)
    host = np.full(64, 5, np.uint8)
    where = host.ctypes.data
    call(cuda, "cudaHostRegister", where, 64, 0)
    assert error_of(cuda, "cudaHostRegister", where, 64, 0) == "cudaErrorHostMemoryAlreadyRegistered"
    call(cuda, "cudaMemcpyAsync", address, where, 64, TO_DEVICE, stream)
    call(cuda, "cudaStreamSynchronize", stream)
    assert "64 bytes of registered memory" in breakable_standin.alive()
    call(cuda, "cudaHostUnregister", where)
    assert error_of(cuda, "cudaHostUnregister", where) == "cudaErrorHostMemoryNotRegistered"
    assert error_of(cuda, "cudaMemcpyAsync", address, where, 64, TO_DEVICE, stream) == "cudaErrorInvalidValue"


@pytest.mark.parametrize("kind", ["cudaMalloc", "cudaHostAlloc"])
def test_double_frees_are_recorded(cuda, breakable_standin, kind):
    address = call(cuda, kind, 64, *([0] if kind == "cudaHostAlloc" else []))
    free = "cudaFree" if kind == "cudaMalloc" else "cudaFreeHost"
    call(cuda, free, address)
    assert breakable_standin.alive() == []
    assert error_of(cuda, free, address) == "cudaErrorInvalidValue"
    assert "double free" in breakable_standin.faults[0]


def test_a_graph_holds_addresses(cuda, breakable_standin):
    stream, address = call(cuda, "cudaStreamCreateWithFlags", 1), call(cuda, "cudaMalloc", 64)
    call(cuda, "cudaStreamBeginCapture", stream, cuda.cudaStreamCaptureMode(1))
    call(cuda, "cudaMemsetAsync", address, 3, 64, stream)
    graph = call(cuda, "cudaStreamEndCapture", stream)
    executable = call(cuda, "cudaGraphInstantiate", graph, 0)
    call(cuda, "cudaGraphDestroy", graph)
    call(cuda, "cudaGraphLaunch", executable, stream)
    call(cuda, "cudaStreamSynchronize", stream)
    call(cuda, "cudaFree", address)
    call(cuda, "cudaGraphLaunch", executable, stream)
    assert error_of(cuda, "cudaStreamSynchronize", stream) == "cudaErrorIllegalAddress"
    assert "after it was freed" in breakable_standin.faults[0]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("cudaMalloc", (64,)), ("cudaHostAlloc", (64, 0)), ("cudaDeviceSynchronize", ())],
)
def test_nothing_is_allocated_or_waited_for_during_capture(cuda, breakable_standin, name, arguments):
    stream = call(cuda, "cudaStreamCreateWithFlags", 1)
    call(cuda, "cudaStreamBeginCapture", stream, cuda.cudaStreamCaptureMode(1))
    other = []
    thread = threading.Thread(target=lambda: other.append(error_of(cuda, name, *arguments)))
    thread.start()
    thread.join()
    assert other == ["cudaSuccess"]  # thread-local mode
    assert error_of(cuda, name, *arguments) == "cudaErrorStreamCaptureUnsupported"
    assert error_of(cuda, "cudaStreamEndCapture", stream) == "cudaErrorStreamCaptureInvalidated"
    assert breakable_standin.faults


def test_waiting_for_a_captured_stream_ends_the_capture(cuda):
    stream = call(cuda, "cudaStreamCreateWithFlags", 1)
    call(cuda, "cudaStreamBeginCapture", stream, cuda.cudaStreamCaptureMode(1))
    assert error_of(cuda, "cudaStreamSynchronize", stream) == "cudaErrorStreamCaptureUnsupported"
    assert error_of(cuda, "cudaStreamEndCapture", stream) == "cudaErrorStreamCaptureInvalidated"


def test_memory_runs_out(cuda, breakable_standin):
    breakable_standin.memory.totals[0] = 1000
    call(cuda, "cudaMalloc", 600)
    assert error_of(cuda, "cudaMalloc", 600) == "cudaErrorMemoryAllocation"
    assert cuda.cudaMemGetInfo() == (cuda.cudaError_t.cudaSuccess, 400, 1000)
    assert error_of(cuda, "cudaGetLastError") == "cudaErrorMemoryAllocation"
    assert error_of(cuda, "cudaGetLastError") == "cudaSuccess"


def test_calls_fail_on_demand(cuda, breakable_standin):
    breakable_standin.fail("cudaMalloc", "cudaErrorMemoryAllocation", after=1)
    names = [error_of(cuda, "cudaMalloc", 64) for _ in range(3)]
    assert names == ["cudaSuccess", "cudaErrorMemoryAllocation", "cudaSuccess"]
    breakable_standin.fail("cudaFree", exception=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        cuda.cudaFree(0)


def test_each_thread_has_a_device_of_its_own(standin_plans):
    from tests.standin.cuda_runtime import cuda_module
    from tests.standin.world import DeviceModel

    world = World([DeviceModel(), DeviceModel()])
    cuda = cuda_module(world)
    call(cuda, "cudaSetDevice", 1)
    stream = call(cuda, "cudaStreamCreateWithFlags", 1)
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(
            [call(cuda, "cudaGetDevice"), error_of(cuda, "cudaStreamSynchronize", stream)]
        )
    )
    thread.start()
    thread.join()
    assert found == [0, "cudaErrorInvalidResourceHandle"]
    assert error_of(cuda, "cudaSetDevice", 2) == "cudaErrorInvalidDevice"


class Engine:
    """The features plan of the demo bundle, deserialised, and what a run of it needs."""

    def __init__(self, world, bundle, plan="features.plan"):
        import tensorrt_rtx as trt
        from cuda.bindings import runtime as cuda

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)
                self.messages = []

            def log(self, severity, message):
                self.messages.append(message)

        self.trt, self.cuda, self.world = trt, cuda, world
        self.logger = Logger()
        self.runtime = trt.Runtime(self.logger)
        content = next((bundle / "engines").iterdir()).joinpath(plan).read_bytes()
        self.engine = self.runtime.deserialize_cuda_engine(content)
        self.config = self.engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self.context = self.engine.create_execution_context(self.config)
        self.stream = call(cuda, "cudaStreamCreateWithFlags", 1)

    def ready(self):
        """Set all that a run needs."""
        for name in map(self.engine.get_tensor_name, range(self.engine.num_io_tensors)):
            address = call(self.cuda, "cudaMalloc", 1 << 20)
            assert self.context.set_tensor_address(name, address)
        size = -(-self.context.update_device_memory_size_for_shapes() // 256) * 256
        self.context.set_device_memory(call(self.cuda, "cudaMalloc", size), size)

    def run(self):
        return self.context.execute_async_v3(int(self.stream))


@pytest.fixture
def engine(breakable_standin, standin_bundle):
    made = Engine(breakable_standin, standin_bundle)
    yield made
    made.context = made.config = None
    gc.collect()
    made.engine = None
    gc.collect()
    made.runtime = None


def test_a_plan_runs_the_graph_that_it_was_built_from(engine):
    engine.ready()
    assert engine.run()
    call(engine.cuda, "cudaStreamSynchronize", engine.stream)
    assert engine.world.faults == []
    assert sum(engine.world.compilations.values()) == 1


def test_a_run_needs_addresses_and_scratch(engine):
    assert not engine.run()
    assert "address of image was not set" in engine.logger.messages[-1]
    engine.ready()
    address = engine.context.device_memory
    engine.context.set_device_memory(address, 256)
    assert not engine.run()
    assert "scratch" in engine.logger.messages[-1]
    engine.context.set_device_memory(address + 8, 1 << 20)
    assert not engine.run()


def test_shapes_outside_of_the_profile_are_refused(breakable_standin, standin_bundle):
    match = Engine(breakable_standin, standin_bundle, "match.plan")
    name = "point_rows"
    *_, largest = match.engine.get_tensor_profile_shape(name, 0)
    assert match.context.set_input_shape(name, largest)
    assert not match.context.set_input_shape(name, (largest[0] + 1, largest[1]))
    assert not match.context.set_input_shape("nothing", largest)
    assert not match.run()  # the other shapes are not set


def test_a_cold_kernel_cannot_be_captured(engine):
    engine.ready()
    cuda = engine.cuda
    call(cuda, "cudaStreamBeginCapture", engine.stream, cuda.cudaStreamCaptureMode(1))
    assert not engine.run()
    assert error_of(cuda, "cudaStreamEndCapture", engine.stream) == "cudaErrorStreamCaptureInvalidated"
    assert "compiled during capture" in engine.world.faults[0]


def test_scratch_that_two_streams_use_is_recorded(engine):
    engine.ready()
    assert engine.run()
    call(engine.cuda, "cudaStreamSynchronize", engine.stream)
    first, engine.stream = engine.stream, call(engine.cuda, "cudaStreamCreateWithFlags", 1)
    assert engine.run()
    assert engine.world.faults == []
    assert engine.context.execute_async_v3(int(first))
    assert engine.world.faults == ["two runs in flight share scratch memory"]
    for stream in (first, engine.stream):
        call(engine.cuda, "cudaStreamSynchronize", stream)


def test_scratch_is_scribbled_over(engine):
    engine.ready()
    address = engine.context.device_memory
    assert engine.run()
    call(engine.cuda, "cudaStreamSynchronize", engine.stream)
    host = np.zeros(256, np.uint8)
    call(engine.cuda, "cudaMemcpy", host.ctypes.data, address, 256, TO_HOST)
    assert (host == 0xA5).all()


def test_an_engine_that_goes_before_its_contexts_is_recorded(engine):
    engine.engine = None
    gc.collect()
    assert any("destroyed before its IExecutionContext" in fault for fault in engine.world.faults)
    assert any("destroyed before its IRuntimeConfig" in fault for fault in engine.world.faults)


def test_kernels_are_kept_and_those_of_another_device_are_refused(engine):
    cache = engine.config.create_runtime_cache()
    engine.config.set_runtime_cache(cache)
    engine.ready()
    assert engine.run()
    blob = bytes(cache.serialize())
    again = engine.config.create_runtime_cache()
    assert again.deserialize(blob)
    assert again.kernels == cache.kernels
    assert not again.deserialize(blob.replace(b"Stand-in", b"Standing"))
    assert not again.deserialize(b"nonsense")


def test_a_plan_of_another_target_is_invalid(breakable_standin, standin_bundle):
    engine = Engine(breakable_standin, standin_bundle)
    content = next((standin_bundle / "engines").iterdir()).joinpath("features.plan").read_bytes()
    assert engine.runtime.get_engine_validity(content)[1] == 0
    breakable_standin.models[0].capability = (8, 7)
    found = engine.runtime.get_engine_validity(content)[1]
    assert found == int(engine.trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    assert engine.runtime.deserialize_cuda_engine(b"nonsense") is None


def test_a_second_logger_is_noticed(engine):
    other = type(engine.logger)()
    engine.trt.Runtime(other)
    assert len(engine.world.loggers) == 2
    engine.runtime.deserialize_cuda_engine(b"nonsense")
    assert engine.logger.messages
    assert not other.messages


@pytest.mark.parametrize("flavour", ["rtx", "10.3.0", "10.13.3.9", "11.4.0.106"])
def test_classes_have_the_public_names_of_the_real_ones(standin_plans, flavour):
    """Of those that tests/engines/api lists: what ditf asks for. Others raise AttributeError."""
    from ditf.runtime.backends.flavour import has
    from tests.standin.modules import api_names, rtx_module, tensorrt_module

    trt = rtx_module(World()) if flavour == "rtx" else tensorrt_module(World(), flavour)
    names = api_names(flavour, "tensorrt-rtx-1.7.1.116") if flavour == "rtx" else api_names(flavour)
    lacking = [f"{cls}.{name}" for cls in names for name in names[cls] if not has(trt, f"{cls}.{name}")]
    assert lacking == []
    for cls in ("IExecutionContext", "ICudaEngine", "Runtime", "IRuntimeConfig", "BuilderFlag"):
        asked = {
            name for one in (api_names("10.3.0"), names, api_names("11.4.0.106")) for name in one.get(cls, ())
        }
        offered = {name for name in asked if has(trt, f"{cls}.{name}")}
        assert offered <= names.get(cls, set()) or flavour == "rtx", cls


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106"])
def test_full_tensorrt_has_the_names_of_its_version(standin_plans, version):
    from ditf.runtime.backends.flavour import has
    from tests.standin.modules import tensorrt_module

    trt = tensorrt_module(World(), version)
    assert trt.__version__ == version
    assert has(trt, "IExecutionContext.set_device_memory") == (version != "10.3.0")
    assert has(trt, "OnnxParser.load_initializer") == (version != "10.3.0")
    assert not has(trt, "IRuntimeCache")
    assert not has(trt, "Runtime.get_engine_validity")
