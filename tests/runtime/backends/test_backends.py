from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from ditf.runtime import backends
from ditf.runtime.backends.cuda import Cuda
from ditf.runtime.backends.flavour import Log, load_flavour
from ditf.runtime.backends.gpu import Gpu, find_gpu
from ditf.runtime.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeSession, saturates
from ditf.runtime.backends.plan_loading import invalidity
from ditf.runtime.bundles.bundle import MATCH, Bundle
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError, InputError, MissingComponent

RTX = "tensorrt-rtx"
DRIVERLESS = pytest.mark.skipif(find_gpu() is not None, reason="a driver answers here")


@pytest.fixture
def with_engine(built_bundle):
    """The demo bundle with an engine for sm_89. Read-only."""
    return Bundle.open(built_bundle)


def test_every_entry_of_the_registry_can_be_probed():
    assert list(backends.BACKENDS) == ["tensorrt", RTX, "onnxruntime"]
    for name in backends.BACKENDS:
        found = backends.load_backend(name).probe()
        assert found.detail
        assert found.available == (found.fix == "")


def test_auto_says_why(demo_bundle):
    opened = backends.open_features(Bundle.open(demo_bundle))
    assert opened.name == "onnxruntime"
    assert isinstance(opened.backend, OnnxRuntimeBackend)
    assert opened.reason == "auto; no tensorrt engine in the bundle; no tensorrt-rtx engine in the bundle"


@DRIVERLESS
def test_auto_passes_over_an_engine_that_cannot_run(with_engine):
    opened = backends.open_features(with_engine)
    assert opened.name == "onnxruntime"
    assert "not tensorrt-rtx: no NVIDIA driver answers" in opened.reason


@DRIVERLESS
@pytest.mark.parametrize("name", ["tensorrt", RTX])
def test_a_named_backend_without_a_driver(name, demo_bundle):
    with pytest.raises(MissingComponent, match="no NVIDIA driver answers") as caught:
        backends.open_features(Bundle.open(demo_bundle), name)
    assert caught.value.exit_code == 3
    assert "--backend onnxruntime" in caught.value.fix
    assert not backends.load_backend(name).probe().available


@DRIVERLESS
def test_the_runtime_api_of_cuda_without_a_driver():
    with pytest.raises(
        MissingComponent, match=r"no NVIDIA driver answers \(cudaError.* of cudaGetDeviceCount"
    ):
        Cuda()


def test_without_cuda_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingComponent, match="cuda-python is not installed") as caught:
        Cuda()
    assert caught.value.fix == "run: pip install 'ditf[tensorrt]'"


def test_an_engine_for_another_gpu_is_not_opened(with_engine, monkeypatch):
    """engine.json decides this; TensorRT-RTX only gives its version and deserialises nothing."""
    gpu = Gpu("NVIDIA Other", "sm_120", 13000, 70)
    monkeypatch.setattr("ditf.runtime.backends.engine.find_gpu", lambda index: gpu)
    with pytest.raises(BundleError, match=r"built for sm_89, this GPU is NVIDIA Other sm_120") as caught:
        backends.open_features(with_engine, RTX)
    assert caught.value.fix == f"run: ditf build {with_engine.path} --backend tensorrt-rtx"


def test_named_backend(demo_bundle):
    opened = backends.open_features(Bundle.open(demo_bundle), "onnxruntime")
    assert (opened.name, opened.reason) == ("onnxruntime", "named")
    assert "CPUExecutionProvider" in opened.backend.probe().detail


@pytest.mark.parametrize("name", ["", "onnx", "ONNXRuntime", "cuda"])
def test_unknown_backend(name, demo_bundle):
    with pytest.raises(InputError, match="unknown backend") as caught:
        backends.open_features(Bundle.open(demo_bundle), name)
    assert caught.value.exit_code == 2
    assert "onnxruntime" in caught.value.fix


@pytest.mark.parametrize("name", ["auto", "onnxruntime"])
def test_without_onnxruntime(monkeypatch, name, demo_bundle):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what an import of a missing package meets
    with pytest.raises(MissingComponent, match="onnxruntime does not import") as caught:
        backends.open_features(Bundle.open(demo_bundle), name)
    assert caught.value.exit_code == 3
    assert "pip install 'ditf[onnxruntime]'" in caught.value.fix


def test_open_session_without_onnxruntime(monkeypatch, demo_bundle):
    backend = backends.load_backend("onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingComponent, match="pip install"):
        backend.open_session(Bundle.open(demo_bundle), MATCH)


def test_session(demo_bundle):
    session = backends.load_backend("onnxruntime").open_session(Bundle.open(demo_bundle), MATCH)
    assert tuple(session.inputs) == ("source", "target", "point_rows", "point_columns", "rows", "columns")
    assert session.outputs == {"points": (None, 2), "scores": (None,)}
    assert "onnxruntime" in session.detail
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.run({"source": np.zeros(1)})
    session.close()  # twice does no harm


def test_a_graph_that_onnx_runtime_refuses():
    [node] = [helper.make_node("NoSuchOperator", ["x"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]))
    with pytest.raises(BundleError, match=r"refuses odd\.onnx") as caught:
        OnnxRuntimeSession(Graph(Path("odd.onnx"), model.SerializeToString(), {}))
    assert "\n" not in str(caught.value)
    assert "export" in caught.value.fix


def test_a_plan_is_judged_by_its_header(with_engine):
    """TensorRT-RTX's own query needs no GPU."""
    trt = load_flavour(RTX)
    log = Log(trt)
    runtime = trt.Runtime(log.logger)
    plan = next((with_engine.path / "engines").glob("*/features.plan")).read_bytes()
    assert invalidity(trt, runtime, plan) == []
    assert "MALFORMED_ENGINE" in invalidity(trt, runtime, b"no plan" * 100)
    del runtime


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        ("fpu sse4_2 avx avx2 fma", True),
        ("avx2 avx512f avx512_vnni", False),
        ("avx2 avx_vnni", False),
        ("fp asimd asimddp", False),
    ],
)
def test_a_cpu_whose_int8_products_saturate_is_recognised(tmp_path, flags, wrong):
    """The features themselves are compared in tests/export/graph/test_quantised_linears.py, on any CPU."""
    (tmp_path / "cpuinfo").write_text(f"model name\t: A CPU\nflags\t\t: {flags}\n")
    assert saturates(tmp_path / "cpuinfo") is wrong
    assert not saturates(tmp_path / "missing")


def test_every_use_of_a_library_hears_its_own_errors():
    """TensorRT keeps the first logger of a process, so the second parse error used to be "no message"."""
    trt = load_flavour(RTX)
    first = Log(trt)
    runtime = trt.Runtime(first.logger)
    for operator in ("NoSuchOperator", "AnotherOne"):
        node = helper.make_node(operator, ["x"], ["y"])
        tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
        graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
        opsets = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        log = Log(trt)
        builder = trt.Builder(log.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        assert not trt.OnnxParser(network, log.logger).parse(model)
        assert "Plugin not found" in log.last
    assert log.logger is first.logger
    del runtime


def test_what_the_library_says_goes_to_pythons_logging(caplog):
    trt = load_flavour(RTX)
    log = Log(trt)
    with caplog.at_level("INFO"):
        log.logger.log(trt.ILogger.Severity.INFO, "built in 2 s")
        log.logger.log(trt.ILogger.Severity.VERBOSE, "a detail")
    assert [record.getMessage() for record in caplog.records] == ["INFO: built in 2 s"]
    assert log.last == "no message"
