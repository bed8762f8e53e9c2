"""Values of features.onnx are named after their modules; those of every family: test_end_to_end.py."""

from __future__ import annotations

import numpy as np

from tests.engines.rtx import parsed_layers


def test_layers_of_an_engine_have_the_names(demo_bundle):
    names = {layer.name for layer in parsed_layers(demo_bundle / "features.onnx")}
    assert any("trunk.blocks.3.feed_forward.up/MatMul" in name for name in names)


def test_sketches_are_of_finite_values(demo_bundle):
    with np.load(demo_bundle / "trace.npz") as arrays:
        assert np.isfinite(arrays["values"]).all()
        assert arrays["lengths"].sum() == len(arrays["values"])
