"""Parsing an ONNX file with TensorRT, and checking the types of the network before it is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ditf.runtime.backends.flavour import Log
from ditf.runtime.backends.graph_loading import parse
from ditf.runtime.bundles.manifest import HIDDEN_STATES
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError, GateFailed

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""{input: (smallest, usual, largest shape)} for inputs with dynamic dimensions."""

_SHORT = {"float16": "HALF", "bfloat16": "BF16", "int8": "HALF"}


@dataclass(frozen=True)
class LayerType:
    """A layer of the parsed network.

    Attributes:
        name: the ONNX node that it came from.
        kind: the layer's type, such as "MATRIX_MULTIPLY".
        value: name of its first output.
        dtype: type of that output.
    """

    name: str
    kind: str
    value: str
    dtype: str


class Network:
    """A parsed network and its builder.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        graph: the graph with its weights; the network refers to the weights without copying them.
        details: keep every message of the library in `log`.

    Raises:
        BundleError: the parser refuses the graph; the error holds its first message.
    """

    def __init__(self, trt: Any, graph: Graph, details: bool = False) -> None:
        self._graph = graph
        self.log = Log(trt, details)
        self.builder = trt.Builder(self.log.logger)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(self.network, self.log.logger)
        if not parse(trt, parser, graph):
            reason = _parse_error(parser) or self.log.last
            raise BundleError(
                f"{trt.__name__} cannot parse {graph.path.name} ({reason})", "export the bundle again"
            )

    @property
    def layers(self) -> tuple[LayerType, ...]:
        """Layers in the network's order, without those that have no output."""
        found = []
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            if layer.num_outputs:
                output = layer.get_output(0)
                found.append(LayerType(layer.name, layer.type.name, output.name, output.dtype.name))
        return tuple(found)


def audit(layers: Collection[LayerType], precision: str, float32_products: Collection[str]) -> None:
    """Check that a features network has the types its bundle promises.

    Args:
        precision: the bundle's precision.
        float32_products: names of the products that the bundle's recipe keeps in float32.

    Raises:
        GateFailed: a product is not 16-bit, or the residual or a norm is; the error names the layer.
    """
    short = _SHORT.get(precision)
    if short is None:
        return
    kept = set(float32_products)
    for one in layers:
        wanted = None
        if one.kind == "MATRIX_MULTIPLY" and one.name.startswith("trunk.") and one.name not in kept:
            wanted = short
        elif one.kind == "NORMALIZATION" or one.value.startswith(HIDDEN_STATES):
            wanted = "FLOAT"
        if wanted is not None and one.dtype != wanted:
            raise GateFailed(
                f"the parsed network computes {one.name} in {one.dtype}, and {precision} means {wanted}",
                "export the bundle again",
            )
    if precision == "int8" and not any(one.kind == "QUANTIZE" for one in layers):
        raise GateFailed("the parsed network of an int8 bundle quantises nothing", "export the bundle again")


def _parse_error(parser: Any) -> str:
    """The parser's first error with its operator; "" if there is none."""
    if not parser.num_errors:
        return ""
    error = parser.get_error(0)
    return f"{error.node_operator()} {error.node_name()}: {error.desc()}"
