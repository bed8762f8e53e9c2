"""TensorRT gets the weights that were read, whether its version takes them from memory or from files."""

from __future__ import annotations

import pytest

from ditf.engines.network import Network
from ditf.runtime.backends import graph_loading
from ditf.runtime.backends.flavour import load_flavour
from ditf.runtime.bundles.bundle import FEATURES, FEATURES_DATA, Bundle
from ditf.runtime.bundles.onnx_graph import Graph
from ditf.runtime.errors import BundleError


@pytest.mark.parametrize("version", ["as installed", "before 10.13"])
def test_a_network_is_made_from_memory(demo_bundle, tmp_path, monkeypatch, version):
    if version != "as installed":
        monkeypatch.setattr(graph_loading, "has", lambda module, name: False)
    monkeypatch.chdir(tmp_path)  # where nothing lies beside the graph
    graph = Bundle.open(demo_bundle).read_graph(FEATURES)
    elsewhere = Graph(tmp_path / FEATURES, graph.model, graph.weights)
    assert len(Network(load_flavour("tensorrt-rtx"), elsewhere).layers) > 100
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_the_parser_refuses(demo_bundle):
    graph = Bundle.open(demo_bundle).read_graph(FEATURES)
    name, (tensor, content) = next(iter(graph.tensors.items()))
    graph.tensors[name] = (tensor, content[:-2])
    with pytest.raises(BundleError, match=r"cannot parse features\.onnx"):
        Network(load_flavour("tensorrt-rtx"), graph)
    assert FEATURES_DATA in graph.weights
