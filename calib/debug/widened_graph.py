"""An ONNX file widened to float32, to see what its 16-bit values really are.

ONNX Runtime's CPU kernels compute most of a float16 graph in float32 and drop the casts between, so a graph
that overflows on a GPU looks perfect there. Here every 16-bit tensor is widened to float32. The graph then
either reports how large each value gets (`with_maxima`), or rounds each value as a GPU would (`rounded`): to
nearest, with overflow to infinity, and products accumulated in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError, missing_extra
from ditf.runtime.files.unfinished import scratch_folder

LARGEST_FINITE = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
"""The largest finite number of each 16-bit type."""

_MOVING = frozenset(
    {
        "Reshape",
        "Transpose",
        "Slice",
        "Split",
        "Concat",
        "Unsqueeze",
        "Squeeze",
        "Expand",
        "Gather",
        "Identity",
    }
)
"""Operators that only move values, which have been rounded before."""

_MAX = "max/"
_MESSAGE_LIMIT = 2_000_000_000  # bytes of a protobuf message, with some room


@dataclass(frozen=True)
class WidenedGraph:
    """A graph in float32, ready to run.

    Attributes:
        model: onnx.ModelProto.
        short: {value: "float16" or "bfloat16"} for every value that is 16-bit in the file, in order.
    """

    model: Any
    short: Mapping[str, str]

    def with_outputs(self, names: Sequence[str]) -> WidenedGraph:
        """The same graph with other outputs.

        Raises:
            BundleError: the graph has no such value.
        """
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        known = {name for node in model.graph.node for name in node.output}
        absent = [name for name in names if name not in known]
        if absent:
            raise BundleError(f"features.onnx has no value {absent[0]}", "export the bundle again")
        del model.graph.output[:]
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
        )
        return WidenedGraph(model, self.short)

    def with_maxima(self) -> WidenedGraph:
        """The same graph, whose outputs are max |x| of every 16-bit value, as scalars, and the features."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for name in self.short:
            model.graph.node.append(onnx.helper.make_node("Abs", [name], [f"abs/{name}"]))
            node = onnx.helper.make_node("ReduceMax", [f"abs/{name}"], [_MAX + name], keepdims=0)
            model.graph.node.append(node)
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(_MAX + name, onnx.TensorProto.FLOAT, [])
            )
        return WidenedGraph(model, self.short)

    def open(self) -> WidenedSession:
        """Open the graph in ONNX Runtime."""
        return WidenedSession(self)


@dataclass
class WidenedSession:
    """A widened graph in ONNX Runtime on the CPU, without optimisations that could drop a rounding.

    Raises:
        MissingComponent: onnxruntime is not installed.
    """

    widened: WidenedGraph
    inputs: dict[str, tuple[int | None, ...]] = field(init=False)
    outputs: dict[str, tuple[int | None, ...]] = field(init=False)
    batches: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        import onnx

        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if self.widened.model.ByteSize() < _MESSAGE_LIMIT:
            content = self.widened.model.SerializeToString()
            self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        else:
            with scratch_folder("ditf-widened-") as folder:
                path = str(folder / "widened.onnx")
                copy = onnx.ModelProto()
                copy.CopyFrom(self.widened.model)  # saving moves the weights out of a message
                onnx.save(copy, path, save_as_external_data=True, location="widened.data")
                self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.inputs, self.outputs = (
            {
                item.name: tuple(size if isinstance(size, int) else None for size in item.shape)
                for item in items
            }
            for items in (self._session.get_inputs(), self._session.get_outputs())
        )

    def run(self, feeds: Mapping[str, np.ndarray], keep: Collection[str] = ()) -> dict[str, np.ndarray]:
        """Run the graph and return every output by name, in host memory."""
        names = [item.name for item in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def maxima(self, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Max |x| of every value, for a graph made by `with_maxima`."""
        return maxima(self.run(feeds))


def maxima(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Max |x| of every value, from the outputs of a graph made by `with_maxima`."""
    return {name.removeprefix(_MAX): float(x) for name, x in outputs.items() if name.startswith(_MAX)}


def widen(graph: Graph, rounded: bool = False) -> WidenedGraph:
    """Widen a graph.

    Args:
        graph: a flat graph with its weights.
        rounded: whether every computed 16-bit value is rounded to its type; otherwise it stays float32.

    Raises:
        MissingComponent: onnx is not installed.
        BundleError: the graph is unreadable, or the type of a value is unknown.
    """
    try:
        import onnx
    except ImportError:
        raise missing_extra("onnx", "check") from None
    try:
        model = onnx.load_from_string(graph.model)
        types = _types(onnx.shape_inference.infer_shapes(model))
        _fill_in(model, graph)
    except Exception as error:  # onnx and protobuf each raise their own
        raise BundleError(
            f"{graph.path} cannot be read ({str(error)[:100]})", "export the bundle again"
        ) from error
    untyped = [name for node in model.graph.node for name in node.output if name and name not in types]
    if untyped:
        raise BundleError(
            f"the type of {untyped[0]} in {graph.path} cannot be told", "export the bundle again"
        )
    computed = [name for node in model.graph.node for name in node.output]
    short = {name: types[name] for name in computed if types.get(name) in LARGEST_FINITE}
    model.graph.CopyFrom(_widened_graph(onnx, model.graph, types, short if rounded else {}))
    return WidenedGraph(model, short)


def _fill_in(model: Any, graph: Graph) -> None:
    """Copy the weights from the external file into the model."""
    import onnx

    for tensor in model.graph.initializer:
        if tensor.name in graph.tensors:
            tensor.raw_data = bytes(graph.tensors[tensor.name][1])
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


def _types(model: Any) -> dict[str, str]:
    """The name of each value's type, by value."""
    import onnx

    graph = model.graph
    types = {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    for tensor in graph.initializer:
        types[tensor.name] = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return types


def _widened_graph(onnx: Any, graph: Any, types: Mapping[str, str], rounding: Mapping[str, str]) -> Any:
    """A copy of a graph in float32, which rounds each value in `rounding` to its type."""
    short = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    wide = onnx.GraphProto()
    wide.name = graph.name
    for tensor in graph.initializer:
        wide.initializer.append(_wide_tensor(onnx, tensor) if tensor.data_type in short else tensor)
    for value in graph.input:
        wide.input.append(value)
        if types[value.name] in LARGEST_FINITE:
            wide.node.append(_cast(onnx, value.name, _wide_name(value.name), "float"))
    renamed = {
        value.name: _wide_name(value.name) for value in graph.input if types[value.name] in LARGEST_FINITE
    }
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        for attribute in copy.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in short:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in short:
                attribute.t.CopyFrom(_wide_tensor(onnx, attribute.t))
        rounded = [name for name in node.output if name in rounding and node.op_type not in _MOVING]
        copy.output[:] = [f"exact/{name}" if name in rounded else name for name in node.output]
        wide.node.append(copy)
        for name in rounded:
            wide.node.append(_cast(onnx, f"exact/{name}", f"short/{name}", rounding[name]))
            wide.node.append(_cast(onnx, f"short/{name}", name, "float"))
    for value in graph.output:
        info = onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, None)
        if types[value.name] in LARGEST_FINITE:
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        wide.output.append(info)
    return wide


def _wide_name(name: str) -> str:
    return f"wide/{name}"


def _wide_tensor(onnx: Any, tensor: Any) -> Any:
    array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    return onnx.numpy_helper.from_array(array, tensor.name)


def _cast(onnx: Any, source: str, target: str, to: str) -> Any:
    kind = getattr(onnx.TensorProto, to.upper())
    return onnx.helper.make_node("Cast", [source], [target], to=kind)
