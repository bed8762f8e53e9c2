"""The report of a graph as tests need it: compiled with TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

from ditf.engines.report.kinds import ATTENTION, COPY, kind_of
from ditf.engines.report.layer_log import read_layers
from ditf.engines.report.summary import Report
from tests.engines.rtx import build_engine


def report_of(onnx, target, profile=None):
    """Compile a graph for a target and report what became of it."""
    return Report(onnx.name, target, read_layers(build_engine(onnx, target, profile, details=True).log))


def unfused(report):
    """The attentions that are not one kernel, by their ONNX softmax."""
    whole = {
        source for layer in report.engine.layers if kind_of(layer) == ATTENTION for source in layer.sources
    }
    every = {source for layer in report.engine.layers for source in layer.sources if "/Softmax" in source}
    return sorted(name for name in every - whole if name.startswith("trunk."))


def copies(report):
    """Kernels of the trunk that only move data, by the ONNX nodes that they came from."""
    return [
        layer.sources
        for layer in report.engine.layers
        if kind_of(layer) == COPY and any(source.startswith("trunk.") for source in layer.sources)
    ]
