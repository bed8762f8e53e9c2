"""Contexts of shapes, runs that fail and CUDA graphs, on the stand-in for a GPU."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from ditf.runtime.backends import load_backend
from ditf.runtime.backends.cuda import OutOfDeviceMemory
from ditf.runtime.backends.engine_records import IMAGE_SIDES, MATCH_PLAN_POINTS
from ditf.runtime.backends.flavour import load_flavour
from ditf.runtime.bundles.bundle import MATCH, Bundle
from ditf.runtime.errors import BundleError, DitfError
from ditf.runtime.features import FeatureMap
from ditf.runtime.matching.match_graph import run_match_graph
from tests.runtime.backends.engine_plans import (
    FULL,
    LIBRARIES,
    RTX,
    double,
    features_plan,
    match_plan,
    multiply,
    opened,
    registered,
)
from tests.standin.engine import log
from tests.standin.fixtures import installed
from tests.standin.world import DeviceModel, World

pytestmark = pytest.mark.usefixtures("standin_plans")
VERSION = "11.4.0.106"


def test_alternating_image_sizes_keep_their_contexts_standin(demo_bundle):
    """18 matches of 20 points on 6 image sizes: one context for each size."""
    bundle = Bundle.open(demo_bundle)
    (h, w), channels = bundle.manifest.grid, bundle.manifest.channels
    graph = bundle.read_graph(MATCH).model
    sizes = dict.fromkeys(("rows", "point_rows"), h) | dict.fromkeys(("columns", "point_columns"), w)
    sides = {name: MATCH_PLAN_POINTS if name.startswith("point") else IMAGE_SIDES for name in sizes}
    profile = {name: [[size, cells] for size in sides[name]] for name, cells in sizes.items()}
    maps = {name: [[1, channels, h, w]] * 3 for name in ("source", "target")}
    source, *targets = (
        FeatureMap(np.random.default_rng(i).normal(size=(channels, h, w)).astype(np.float16), (40 + i, 50))
        for i in range(7)
    )
    points = np.random.default_rng(9).uniform((0, 0), (49, 39), (20, 2))
    reference = load_backend("onnxruntime").open_session(bundle, MATCH)
    expected = [run_match_graph(reference, (h, w), source, target, points) for target in targets]
    with installed(World()) as world:
        with opened(registered(graph, [{**maps, **profile}])) as session:
            for target, matches in zip(targets * 3, expected * 3, strict=True):
                found = run_match_graph(session, (h, w), source, target, points)
                np.testing.assert_array_equal(found.points, matches.points)
        assert world.calls["create_execution_context"] == len(targets)
        assert not world.faults


def test_growing_buffers_keep_the_contexts_standin():
    with installed(World()) as world, opened(match_plan()) as session:
        for _ in range(2):
            for size in (3, 20, 60):
                multiply(session, size, size)
        assert world.calls["create_execution_context"] == 3
        assert not world.faults


@pytest.mark.parametrize(("total", "kept"), [(8 << 30, 32), (25_000, 4)])
def test_contexts_are_bounded_by_number_and_by_free_memory_standin(total, kept):
    """Of the smaller GPU, the sessions' buffers leave less than an eighth."""
    with installed(World([DeviceModel(total_bytes=total)])) as world, opened(match_plan()) as session:
        for size in range(64, 24, -1):
            multiply(session, size, size)
        assert world.alive().count("execution context") == kept
        assert not world.faults


@pytest.mark.parametrize(("library", "full"), LIBRARIES)
def test_a_failed_run_is_waited_for_and_is_not_warm_standin(library, full):
    with installed(World(), full) as world, opened(features_plan(), library) as session:
        world.fail("execute_async_v3")
        with pytest.raises(DitfError, match="cannot run"):
            double(session)
        assert not any(stream.queue for stream in world.streams.values())
        double(session, 1)  # a capture here would have to compile
        assert not world.executables
        double(session, 2)
        assert bool(world.executables) == (library == FULL)
        assert not world.faults


@pytest.mark.parametrize("name", ["set_input_shape", "set_tensor_address", "set_optimization_profile_async"])
def test_what_tensorrt_refuses_is_said_standin(name):
    with installed(World()) as world, opened(features_plan(((1, 2), (3, 8)))) as session:
        double(session, 0, 2)
        world.fail(name)
        with pytest.raises(BundleError, match=r"does not take .* \(the .* was made to fail\)"):
            double(session, 0, 8)
        double(session, 0, 8)
        assert not world.faults


def test_no_context_standin():
    with installed(World()) as world, opened(features_plan()) as session:
        world.fail("create_execution_context")
        with pytest.raises(BundleError, match="gives no execution context"):
            double(session)
        double(session)


@pytest.mark.parametrize(
    "words", ["Cuda Runtime (out of memory)", "OutOfMemory (Requested size was 8 bytes.)"]
)
def test_contexts_make_room_for_another_standin(words, monkeypatch):
    with installed(World()) as world:
        trt = load_flavour(RTX)
        create = trt.ICudaEngine.create_execution_context

        def crowded(engine, config):
            if world.alive().count("execution context") < 2:
                return create(engine, config)
            log(world, trt, words)
            return None

        monkeypatch.setattr(trt.ICudaEngine, "create_execution_context", crowded)
        with opened(match_plan()) as session:
            for size in (3, 4, 5, 3):
                multiply(session, size, size)
            monkeypatch.setattr(
                trt.ICudaEngine, "create_execution_context", lambda *_: log(world, trt, words)
            )
            with pytest.raises(OutOfDeviceMemory, match="gives no execution context"):
                multiply(session, 6, 6)
        assert not world.faults


def test_tensorrt_captures_the_second_run_standin():
    with installed(World(), VERSION) as world, opened(match_plan(), FULL) as session:
        for _ in range(5):
            multiply(session, 3, 4)
        assert world.calls["execute_async_v3"] == 2  # plain, captured
        assert world.calls["cudaGraphLaunch"] == 4
        assert not world.faults


def test_tensorrt_rtx_captures_by_itself_standin():
    """A capture of ours could hold the slow kernels that run while the fast ones are compiled.

    The library keeps one graph for a context. It captures again when the shapes or addresses of one change.
    """
    with installed(World()) as world, opened(match_plan()) as session:
        for size in (64, 3, 20) * 5:
            multiply(session, size, size)
        assert world.calls["cudaStreamBeginCapture"] == 0
        assert world.own_graphs == {"captured": 3, "replayed": 9}  # each of 5 runs but the first
        assert not world.faults


@pytest.mark.parametrize(("name", "eager"), [("features", True), ("match", False)])
def test_how_tensorrt_rtx_compiles_standin(name, eager, monkeypatch):
    """A features plan meets few shapes; the first match of an image size does not wait for a compiler."""
    configs = []
    with installed(World()):
        trt = load_flavour(RTX)
        create = trt.ICudaEngine.create_execution_context
        monkeypatch.setattr(
            trt.ICudaEngine,
            "create_execution_context",
            lambda self, config: configs.append(config) or create(self, config),
        )
        plan, run = (features_plan(((1, 8),)), double) if name == "features" else (match_plan(), multiply)
        with opened(plan) as session:
            run(session, 1, 2)
        [config] = configs
        assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        expected = strategies.EAGER if eager else strategies.LAZY
        assert config.dynamic_shapes_kernel_specialization_strategy == expected


@pytest.mark.parametrize(("library", "full"), [(RTX, None), (FULL, VERSION)])
def test_a_capture_that_is_impossible_is_said_once_standin(library, full, caplog):
    """TensorRT-RTX can capture no plan that allocates while it runs."""
    with installed(World(), full) as world:
        plan = features_plan(((1, 8),), flags=())
        world.fail("cudaStreamBeginCapture", "cudaErrorStreamCaptureUnsupported", times=100)
        with caplog.at_level(logging.WARNING), opened(plan, library) as session:
            for batch in (1, 2, 3) * 3:
                double(session, batch, batch)
        told = [record.message for record in caplog.records if "without a CUDA graph" in record.message]
        assert len(told) == 1
        assert not world.faults
