"""Values of features.onnx are named after their modules, and what enters a block can be found."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from ditf.calib.bisect import bisect
from ditf.calib.onnx_twin import widened
from ditf.export.exporter import export_bundle
from ditf.export.options import ExportOptions
from ditf.runtime.bundle import Bundle
from tests.engines.rtx import build_engine
from tests.export.parity import family_named, subjects

CASES = [
    ("dit", "3", "bake", 3),
    ("pixart", "3", "live", 1),
    ("sd3", "2", "bank", 1),
    ("sd35", "3", "bake", 1),
    ("flux", "1", "bake", 1),
    ("flux", "4", "live", 3),
    ("auraflow", "4", "bake", 1),
    ("schnell", "0", "bake", 1),
    ("flux2", "4", "bank", 1),
    ("lumina2", "4", "bank", 1),
]


@pytest.mark.parametrize(("name", "layer", "mode", "ensemble"), CASES)
def test_what_enters_every_block_is_the_unmodified_models(checkpoint, tmp_path, name, layer, mode, ensemble):
    folder = checkpoint(name)
    options = ExportOptions(
        model=str(folder),
        layer=layer,
        precision="float16",
        conditioning=mode,
        size=(48, 80),
        ensemble=ensemble,
        output=tmp_path / "bundle",
        **subjects(family_named(folder), 1),
    )
    bundle = Bundle.open(export_bundle(options))
    graph = onnx.load(bundle.path / "features.onnx", load_external_data=False).graph
    names = [value for node in graph.node for value in node.output]
    assert len(names) == len(set(names))
    assert [n for n in names if n.startswith("hidden_states.")] == [
        f"hidden_states.{index}" for index in range(int(layer) + 1)
    ]
    twin = widened(bundle.path / "features.onnx", rounded=True)
    found = bisect(bundle, twin, bundle.read_arrays("golden.npz"), features_ok=True)
    assert found.place == ""
    # Rounding is that far from being called a fault: the same arithmetic, summed in another order.
    assert all(one.error < one.limit / 2 for one in found.boundaries)
    assert len(bundle.read_arrays("trace.npz")["names"]) > 10


def test_layers_of_an_engine_have_the_names(demo_bundle):
    names = {layer.name for layer in build_engine(demo_bundle / "features.onnx", "sm_89").layers}
    assert any("trunk.blocks.3.feed_forward.up/MatMul" in name for name in names)


def test_sketches_are_of_finite_values(demo_bundle):
    with np.load(demo_bundle / "trace.npz") as arrays:
        assert np.isfinite(arrays["values"]).all()
        assert arrays["lengths"].sum() == len(arrays["values"])
