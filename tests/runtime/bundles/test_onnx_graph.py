"""All references of a graph to other files are found, as ONNX's own package finds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ditf.runtime.bundles.onnx_graph import FIELDS, ITEM_BYTES, ExternalTensor, Graph, external_tensors

WEIGHTS = "weights.bin"


def external(
    name: str, shape: tuple[int, ...] = (2, 3), location: str = WEIGHTS, **entries: str
) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def model_of(*initializers: TensorProto, nodes: tuple[onnx.NodeProto, ...] = ()) -> ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"]), *nodes], "g", [x], [y], list(initializers)
    )
    return helper.make_model(graph)


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


def in_subgraph(tensor: TensorProto) -> onnx.NodeProto:
    graph = helper.make_graph([], "inner", [], [], [tensor])
    return helper.make_node("If", ["x"], ["z"], then_branch=graph, else_branch=graph)


def graph_of(model: ModelProto, **weights: bytes) -> Graph:
    return Graph(Path("g.onnx"), model.SerializeToString(), {WEIGHTS: bytes(24), **weights})


def test_the_table_of_fields_is_onnx_own() -> None:
    """The table holds exactly the fields of onnx.proto that lead from a model to a tensor."""
    reaches = {"TensorProto"}
    types = {name: kind for name, kind in vars(onnx).items() if hasattr(kind, "DESCRIPTOR")}
    found: dict[str, dict[int, str]] = {}
    while True:
        found = {
            name: {
                field.number: field.message_type.name
                for field in kind.DESCRIPTOR.fields
                if field.message_type is not None and field.message_type.name in reaches
            }
            for name, kind in types.items()
            if hasattr(kind.DESCRIPTOR, "fields")
        }
        wider = {"TensorProto", *(name for name, fields in found.items() if fields)}
        if wider == reaches:
            break
        reaches = wider
    from_model, waiting = {"ModelProto"}, ["ModelProto"]
    while waiting:
        new = {kind for kind in found[waiting.pop()].values() if kind != "TensorProto"} - from_model
        from_model |= new
        waiting += new
    assert {name: found[name] for name in from_model} == FIELDS


def test_sizes_of_types_are_onnx_own() -> None:
    for number, size in ITEM_BYTES.items():
        assert helper.tensor_dtype_to_np_dtype(number).itemsize == size, number


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 300), max_size=4), st.integers(0, 2**62), st.integers(0, 2**62)),
        max_size=5,
    )
)
def test_what_is_read_is_what_onnx_wrote(described: list[tuple[list[int], int, int]]) -> None:
    tensors = [
        external(f"w{index}", tuple(shape), offset=str(offset), length=str(length))
        for index, (shape, offset, length) in enumerate(described)
    ]
    inside = numpy_helper.from_array(np.ones(4, np.float32), "inside")
    assert external_tensors(model_of(inside, *tensors).SerializeToString()) == [
        ExternalTensor(f"w{index}", 1, tuple(shape), WEIGHTS, offset, length)
        for index, (shape, offset, length) in enumerate(described)
    ]


@given(st.binary(max_size=200))
def test_rubbish_is_refused(content: bytes) -> None:
    try:
        tensors = external_tensors(content)
    except ValueError:
        return
    parsed = ModelProto()
    parsed.ParseFromString(content)  # what is accepted, ONNX's own package reads too
    assert len(tensors) <= len(parsed.graph.initializer)


def test_values_are_where_the_graph_says() -> None:
    content = np.arange(12, dtype=np.float32).tobytes()
    model = model_of(external("a", offset="24", length="24"), external("b", (3,), offset="0", length="12"))
    graph = graph_of(model, **{WEIGHTS: content})
    assert np.frombuffer(graph.tensors["a"][1], np.float32).tolist() == [6, 7, 8, 9, 10, 11]
    assert np.frombuffer(graph.tensors["b"][1], np.float32).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of(external("w", location="/etc/passwd")), "none of its files"),
        (model_of(external("w", location="../other/w.bin")), "none of its files"),
        (model_of(external("w", location="engines/w.bin")), "none of its files"),
        (model_of(external("w", offset="8")), "16 bytes, its shape needs 24"),
        (model_of(external("w", offset="8", length="24")), "lies outside"),
        (model_of(external("w", offset="-8", length="24")), "no valid offset"),
        (model_of(external("w", length="12")), "12 bytes, its shape needs 24"),
        (model_of(external("w"), external("w")), "two initializers are named 'w'"),
        (model_of(external("w", basepath="..")), "does not name"),
        (model_of(nodes=(constant(external("c")),)), "no initializer of the main graph"),
        (model_of(nodes=(in_subgraph(external("c")),)), "no initializer of the main graph"),
    ],
)
def test_references_that_are_refused(model: ModelProto, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph_of(model)


def test_a_function_and_a_sparse_tensor_are_looked_into() -> None:
    model = model_of()
    function = model.functions.add()
    function.node.append(constant(external("c")))
    with pytest.raises(ValueError, match="no initializer of the main graph"):
        graph_of(model)
    model = model_of()
    model.graph.sparse_initializer.add().values.CopyFrom(external("s"))
    with pytest.raises(ValueError, match="no initializer of the main graph"):
        graph_of(model)


def test_graphs_that_are_nested_without_end() -> None:
    tensor = numpy_helper.from_array(np.ones(1, np.float32), "t")
    node = constant(tensor)
    for _ in range(25):
        graph = helper.make_graph([node], "inner", [], [])
        node = helper.make_node("If", ["x"], ["z"], then_branch=graph)
    with pytest.raises(ValueError, match="nested more than"):
        graph_of(model_of(nodes=(node,)))
