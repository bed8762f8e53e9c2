"""The ONNX files of a bundle: valid, typed as the recipe says, of the opset asked for, and private."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest

from ditf.export.exporter import export_bundle
from ditf.export.planning.export_options import OPSETS, ExportOptions, check_opset
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import InputError

HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def typed(demo_bundle):
    """Nodes of the float16 demo graph with the type of their first output."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(demo_bundle / "features.onnx")))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    return [(node.op_type, types.get(node.output[0])) for node in model.graph.node]


def test_float16_where_the_recipe_says(typed):
    by_operator = {}
    for operator, dtype in typed:
        by_operator.setdefault(operator, set()).add(dtype)
    assert by_operator["MatMul"] == {HALF}
    assert by_operator["Softmax"] == {HALF}
    assert by_operator["Gelu"] == {HALF}
    assert by_operator["LayerNormalization"] == {FLOAT}
    assert by_operator["Conv"] == {FLOAT}  # the patch embedder writes the residual


def test_one_norm_node_for_norm_and_modulation(typed):
    assert Counter(operator for operator, _ in typed)["LayerNormalization"] == 2 * 9 + 1


def test_no_transposed_weights(demo_bundle):
    """Weights are stored as they are multiplied: only attention's heads are transposed."""
    graph = onnx.load(str(demo_bundle / "features.onnx"), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    assert not [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]


@pytest.mark.parametrize("name", ["features.onnx", "match.onnx"])
def test_graphs_are_valid_and_tell_nothing_of_the_machine(demo_bundle, root, name):
    onnx.checker.check_model(str(demo_bundle / name), full_check=True)
    content = (demo_bundle / name).read_bytes()
    assert str(root).encode() not in content
    assert b"site-packages" not in content


def test_weights_lie_in_one_file_beside_the_graph(demo_bundle):
    names = {path.name for path in demo_bundle.iterdir()}
    assert {"features.onnx", "features.onnx.data", "match.onnx"} <= names
    assert "match.onnx.data" not in names


@pytest.mark.parametrize("opset", [18, 25])
def test_opsets(tmp_path, tiny_pixart, opset):
    options = ExportOptions(
        model=str(tiny_pixart), layer="1", precision="float16", opset=opset, output=tmp_path / "b"
    )
    model = onnx.load(str(export_bundle(options) / "features.onnx"), load_external_data=False)
    assert {item.version for item in model.opset_import if not item.domain} == {opset}


def test_bfloat16_takes_the_opset_that_has_its_convolutions(bfloat16_bundle, tiny_pixart, tmp_path):
    manifest = read_manifest(bfloat16_bundle)
    assert manifest.opset == 22
    for name in ("features.onnx", "match.onnx"):
        model = onnx.load(str(bfloat16_bundle / name), load_external_data=False)
        assert {item.version for item in model.opset_import} == {22}
    options = ExportOptions(model=str(tiny_pixart), precision="bfloat16", opset=21, output=tmp_path / "b")
    with pytest.raises(InputError, match="the VAE's bfloat16 convolutions need opset 22; leave --opset out"):
        export_bundle(options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [OPSETS[0] - 1, OPSETS[-1] + 1])
def test_opsets_known_to_come_out_wrong(opset):
    with pytest.raises(InputError, match=r"choose 18\.\.25"):
        check_opset(opset)
