"""Handing a graph in memory to TensorRT's ONNX parser or refitter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ditf.runtime.backends.flavour import has
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.files.unfinished import scratch_folder

_MODEL = "graph.onnx"


def parse(trt: Any, parser: Any, graph: Graph) -> bool:
    """Parse a graph with an OnnxParser; False if the parser refuses it.

    The network that is made refers to the graph's weights, so the caller must keep the graph alive.
    """
    if has(trt, "OnnxParser.load_initializer"):
        return _loaded(parser, graph) and bool(parser.parse_model_proto())
    return _from_file(graph, parser.parse_from_file)


def refit(trt: Any, refitter: Any, logger: Any, graph: Graph) -> bool:
    """Set a refitter's weights from a graph; False if they do not fit."""
    loader = trt.OnnxParserRefitter(refitter, logger)
    if has(trt, "OnnxParserRefitter.load_initializer"):
        return _loaded(loader, graph) and bool(loader.refit_model_proto())
    return _from_file(graph, loader.refit_from_file)


def _loaded(parser: Any, graph: Graph) -> bool:
    return bool(parser.load_model_proto(graph.model)) and all(
        parser.load_initializer(name, np.frombuffer(content, np.uint8).ctypes.data, len(content))
        for name, (_, content) in graph.tensors.items()
    )


def _from_file(graph: Graph, use: Callable[[str], bool]) -> bool:
    """For TensorRT before 10.13, which reads weights from files: use a copy that nobody else can write."""
    with _private_copy(graph) as path:
        return bool(use(str(path)))


@contextmanager
def _private_copy(graph: Graph) -> Iterator[Path]:
    with scratch_folder("ditf-graph-") as folder:
        path = folder / _MODEL
        path.write_bytes(graph.model)
        for location, content in graph.weights.items():
            path.with_name(location).write_bytes(content)
        yield path
