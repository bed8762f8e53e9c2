"""TensorRT-RTX as the tests use it: it needs no GPU to build."""

from __future__ import annotations

from ditf.engines.compile import BuildOptions, compile_plan
from ditf.engines.network import Network
from ditf.runtime.backends.flavour import load_flavour
from ditf.runtime.bundles.onnx_graph import Graph


def parsed_layers(onnx):
    """The layers of a graph as TensorRT-RTX's parser sees them; nothing is compiled."""
    return Network(load_flavour("tensorrt-rtx"), Graph.read(onnx)).layers


def build_engine(onnx, target=None, profile=None, details=False):
    """A plan and its layers, for a target or any; with details, the builder's log as well."""
    trt = load_flavour("tensorrt-rtx")
    profiles = [profile] if profile else []
    return compile_plan(trt, Graph.read(onnx), BuildOptions(target), profiles, details=details)
