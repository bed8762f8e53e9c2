"""A float16 graph widened to float32: nothing hidden, and rounded as true float16 arithmetic rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ditf.calib.debug.widened_graph import widen
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def save(path, nodes, x_shape, y_shape, weights, output=HALF):
    """A graph of float16 x to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", HALF, x_shape)],
        [helper.make_tensor_value_info("y", output, y_shape)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def linear(path, scale):
    rng = np.random.default_rng(0)
    weights = {
        "w": (rng.standard_normal((16, 8)) * scale).astype(np.float16),
        "b": (rng.standard_normal(8) * scale).astype(np.float16),
        "back": (rng.standard_normal((8, 4)) / scale).astype(np.float16),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["wx"]),
        helper.make_node("Add", ["wx", "b"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "back"], ["y"]),
    ]
    return save(path, nodes, [3, 16], [3, 4], weights)


def softmax(path, scale):
    weights = {"w": (np.random.default_rng(0).standard_normal((16, 8)) * scale).astype(np.float16)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"], axis=-1),
    ]
    return save(path, nodes, [3, 16], [3, 8], weights)


def norm_island(path, scale):
    weights = {"w": np.eye(16, dtype=np.float16) * np.float16(scale), "one": np.ones(16, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["wx"]),
        helper.make_node("Cast", ["wx"], ["wide"], to=FLOAT),
        helper.make_node("LayerNormalization", ["wide", "one"], ["normed"], epsilon=1e-6),
        helper.make_node("Cast", ["normed"], ["y"], to=HALF),
    ]
    return save(path, nodes, [3, 16], [3, 16], weights)


def inputs():
    return np.random.default_rng(1).standard_normal((3, 16)).astype(np.float16)


@pytest.mark.parametrize("make", [linear, softmax, norm_island])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_rounded_is_float16_arithmetic(tmp_path, make, scale):
    """Against onnx's own reference, which computes in numpy's float16; both accumulate products apart."""
    path = make(tmp_path / "g.onnx", scale)
    with np.errstate(over="ignore", invalid="ignore"):
        [expected] = ReferenceEvaluator(str(path)).run(None, {"x": inputs()})
    actual = widen(Graph.read(path), rounded=True).open().run({"x": inputs()})["y"]
    np.testing.assert_allclose(actual, expected.astype(np.float32), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("make", [linear, norm_island])
def test_overflow_that_onnx_runtime_hides(tmp_path, make):
    """The second product brings the first back into range: in float32 all is well."""
    path = make(tmp_path / "g.onnx", 2e4)
    x = inputs() * np.float16(4)
    with np.errstate(over="ignore", invalid="ignore"):
        [true] = ReferenceEvaluator(str(path)).run(None, {"x": x})
    assert not np.isfinite(true).all()
    hidden = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    assert np.isfinite(hidden).all()
    assert not np.isfinite(widen(Graph.read(path), rounded=True).open().run({"x": x})["y"]).all()
    maxima = widen(Graph.read(path)).with_maxima().open().maxima({"x": x})
    assert maxima["wx"] > 65504


@pytest.mark.parametrize(("value", "expected"), [(2049.0, 2048.0), (1e5, np.inf), (3e-8, 5.9604645e-08)])
def test_values_are_rounded_once_computed(tmp_path, value, expected):
    weights = {"w": np.array([value / 4], np.float32).astype(np.float16), "four": np.float16(4.0).reshape(1)}
    if value == 2049.0:
        weights = {"w": np.float16(2048.0).reshape(1), "four": np.float16(1.0).reshape(1)}
    operator = "Add" if value == 2049.0 else "Mul"
    nodes = [
        helper.make_node(operator, ["w", "four"], ["exact_product"]),
        helper.make_node("Cast", ["exact_product"], ["y"], to=FLOAT),
    ]
    path = save(tmp_path / "g.onnx", nodes, [1], [1], weights, FLOAT)
    [actual] = widen(Graph.read(path), rounded=True).open().run({"x": np.zeros(1, np.float16)})["y"]
    if value > 3e-7:
        assert actual == expected
    exact = widen(Graph.read(path)).open().run({"x": np.zeros(1, np.float16)})["y"]
    assert exact[0] == pytest.approx(value, rel=1e-3, abs=1e-7)


def test_maxima_are_of_every_float16_value(tmp_path):
    path = linear(tmp_path / "g.onnx", 1.0)
    widened = widen(Graph.read(path))
    assert list(widened.short) == ["wx", "hidden", "y"]
    [y] = onnxruntime.InferenceSession(str(path)).run(None, {"x": inputs()})
    assert widened.with_maxima().open().maxima({"x": inputs()})["y"] == pytest.approx(
        np.abs(y).max(), rel=2e-3
    )
    hidden = widened.with_outputs(["hidden"]).open().run({"x": inputs()})["hidden"]
    assert hidden.shape == (3, 8)
    with pytest.raises(BundleError, match="has no value nothing"):
        widened.with_outputs(["nothing"])


def test_a_graph_of_unknown_operators():
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]))
    node.output.append("hidden")
    model.graph.node[0].CopyFrom(node)
    with pytest.raises(BundleError, match=r"bad\.onnx cannot be"):
        widen(Graph(Path("bad.onnx"), model.SerializeToString(), {}))
