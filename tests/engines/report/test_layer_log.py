"""The log of a real build, and logs in forms that are not known."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ditf.engines.report.kinds import (
    ATTENTION,
    CAST,
    CONVOLUTION,
    COPY,
    NO_KERNELS,
    POINTWISE,
    PRODUCT,
    SHAPE,
    SYNC,
    computes_in,
    kind_of,
    operations,
)
from ditf.engines.report.layer_log import read_layers
from ditf.runtime.errors import DitfError
from tests.engines.reports import report_of, unfused

TENSOR = "{{ Name: {}, Dimensions: [{}], Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Linear) }}"


def line(name, kind, inputs=(), constants=(), outputs=(), sources=()):
    """A line of the log, as TensorRT-RTX 1.7.1 writes it."""
    lists = (", ".join(TENSOR.format(*one) for one in part) for part in (inputs, constants, outputs))
    three = ", ".join(
        f"{what}: [ {text}]" for what, text in zip(("Inputs", "Constants", "Outputs"), lists, strict=True)
    )
    metadata = "".join(f"[ONNX Layer: {source}]" for source in sources)
    return f"Name: {name}, LayerType: {kind}, {three}, TacticName: , StreamId: 0, Metadata: {metadata}"


def only(*arguments, **keywords):
    (layer,) = read_layers([line(*arguments, **keywords)]).layers
    return layer


def graph(path, nodes, inputs, outputs, constants):
    """Save a graph of float16 tensors."""
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in part.items()]
        for part in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "g", *values, initializers)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_operations_and_bytes_of_a_product_are_those_of_its_shapes(tmp_path):
    """[60, 96] x [96, 160]: the figures follow from the shapes alone, whatever kernel the builder takes."""
    weight = np.random.default_rng(0).standard_normal((96, 160)).astype(np.float16)
    path = graph(
        tmp_path / "g.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": [60, 96]}, {"y": [60, 160]}, {"w": weight},
    )  # fmt: skip
    report = report_of(path, "sm_89")
    products = [layer for layer in report.engine.layers if kind_of(layer) == PRODUCT]
    assert sum(map(operations, products)) == 2 * 60 * 96 * 160
    assert {computes_in(layer) for layer in products} == {"float16"}
    least = 2 * (60 * 96 + 96 * 160 + 60 * 160)
    assert least <= report.bytes_moved <= least * 1.1  # and the product's alpha and beta
    assert report.engine.weight_bytes >= weight.nbytes


def test_attention_is_one_kernel_in_float16_and_none_in_float32(tmp_path):
    """Six heads of 64 over 40 tokens, written out as two products and a softmax."""
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["weights"], name="trunk.attention/Softmax"),
        helper.make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    shapes = {"q": [1, 6, 40, 64], "k": [1, 6, 64, 40], "v": [1, 6, 40, 64]}
    short = graph(tmp_path / "short.onnx", nodes, shapes, {"y": [1, 6, 40, 64]}, {})
    report = report_of(short, "sm_86")
    fused = [layer for layer in report.engine.layers if kind_of(layer) == ATTENTION]
    assert len(fused) == 1
    assert operations(fused[0]) == 4 * 6 * 40 * 40 * 64
    assert unfused(report) == []
    long = onnx.load(short)
    for value in (*long.graph.input, *long.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(long, tmp_path / "long.onnx")
    assert unfused(report_of(tmp_path / "long.onnx", "sm_86")) == ["trunk.attention/Softmax"]


def test_kinds():
    half = [("x", "1,8,16", "Half")]
    assert kind_of(only("__myl_AddReshTranReshMove_myl0_4", "kgen", half)) == COPY
    assert kind_of(only("__myl_MoveConc_myl0_4", "kgen", half)) == COPY
    assert kind_of(only("__myl_Cast_myl0_4", "kgen", half)) == CAST
    assert kind_of(only("__myl_AddMeanSubMulMeanAddSqrtDivMulMulAddCast_myl0_2", "kgen", half)) == POINTWISE
    assert kind_of(only("__myl_CastTranMulMoveAddMulAdd_myl0_0", "kgen", half)) == POINTWISE
    assert kind_of(only("__myl_FcAddMulTanh_myl0_10", "runtime_fusion", half)) == PRODUCT
    assert kind_of(only("vae/Conv_U1", "correlation", half)) == CONVOLUTION
    assert kind_of(only("__mye7_myl0_83", "signal")) == SYNC
    assert kind_of(only("[ShapeHostToDeviceCopy 0]", "ShapeHostToDevice")) == SHAPE


def test_a_convolution_counts_its_filters():
    layer = only(
        "Conv",
        "correlation",
        [("x", "1,3,96,96", "Float")],
        [("w", "128,3,8,8", "Float"), ("a", "1", "Float")],
        [("y", "1,128,12,12", "Half")],
    )
    assert operations(layer) == 2 * 128 * 12 * 12 * 3 * 8 * 8
    assert (layer.read, layer.written) == (4 * (3 * 96 * 96 + 128 * 3 * 64 + 1), 2 * 128 * 12 * 12)


def test_a_product_that_adds_to_a_residual_computes_in_its_weights_type():
    """The residual comes first among the inputs of TensorRT-RTX 1.7.1; it is no factor."""
    layer = only(
        "__myl_FcAddCastMulAdd_myl0_44",
        "runtime_fusion",
        [("z", "1,512,256", "Float"), ("x", "1,512,1024", "Half")],
        [("gate", "1,1,256", "Float"), ("bias", "1,1,256", "Half"), ("w", "1,1024,256", "Half")],
        [("y", "1,512,256", "Float")],
    )
    assert computes_in(layer) == "float16"
    assert operations(layer) == 2 * 512 * 256 * 1024


def test_a_dynamic_dimension_counts_as_one():
    assert only("x", "kgen", [("x", "-1,8", "Half")]).inputs[0].shape == (1, 8)


def test_what_works_out_a_dynamic_shape_launches_nothing():
    for name, kind in (("__mye9_myl0_6", "reshape"), ("cast_hvar^9i64_myl0_7", "cast")):
        assert kind_of(only(name, kind)) in NO_KERNELS


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "lists no compiled layers"),
        (["Total Activation Memory: 8 bytes"], "lists no compiled layers"),
        (["Name: x, LayerType: kgen, In: 4"], "unknown form"),
        ([line("x", "kgen", [("x", "1", "Float3")])], "unknown type Float3"),
    ],
)
def test_a_log_in_an_unknown_form_is_refused(messages, problem):
    with pytest.raises(DitfError, match=problem) as caught:
        read_layers(messages)
    assert caught.value.fix == "leave --report out"
