"""Bundles of every family on ONNX Runtime against the checkpoint's own pipeline, and through TensorRT-RTX."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

import ditf
from ditf.calib.debug.bisect import bisect
from ditf.calib.debug.widened_graph import widen
from ditf.calib.images import golden_pair
from ditf.calib.parity import feature_parity, worst
from ditf.export import exporter
from ditf.export.bundle_graphs import match_onnx
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.oracle.oracle import Oracle
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.bundles.bundle import Bundle
from tests.engines.rtx import build_engine
from tests.export.parity import family_named, own_pipeline, photographs, subjects

BUNDLES = [
    # checkpoint, layer, conditioning, fp16, and what else is unusual; test_parity.py has every combination as
    # a module, and other tests check the bundles of conftest.py with `ditf check` and build them.
    ("dit", "2", "bake", True, {"size": (48, 80)}),
    ("dit", "1", "bank", False, {"ensemble": 3}),
    ("pixart", "1", "bake", False, {"size": (216, 224)}),  # the VAE's attention is in chunks
    ("pixart", "0", "live", True, {}),
    ("pixart-1024", "2", "live", True, {}),
    ("sigma", "2", "bank", True, {"size": (48, 80), "ensemble": 3, "noise": "input"}),
    ("sd3", "3", "bake", True, {"ensemble": 3}),
    ("sd35", "3", "bank", True, {"batch": "dynamic"}),
    ("sd35-large", "2", "live", True, {}),
    ("flux", "single.2", "bake", True, {"size": (48, 80), "batch": "dynamic", "ensemble": 3}),
    ("flux", "single.2", "live", False, {"size": (80, 48)}),
    ("auraflow", "single.2", "bake", True, {"ensemble": 3, "batch": "dynamic"}),
    ("auraflow", "single.0", "live", True, {}),
    ("flux2", "double.1", "bake", True, {"size": (48, 80)}),
    ("flux2", "single.2", "live", True, {"ensemble": 3}),
    ("lumina2", "layer.2", "bake", True, {"size": (48, 80), "batch": "dynamic", "ensemble": 3}),
    ("lumina2", "layer.2", "live", True, {"size": (80, 48)}),
    ("chroma", "single.1", "live", True, {"size": (80, 48)}),
    ("zimage", "layer.1", "live", True, {"size": (48, 80), "ensemble": 3}),
]


@pytest.fixture(autouse=True)
def one_matcher(monkeypatch):
    """match.onnx depends on no family and is not run here: one serves all. Tracing it takes 2 seconds."""
    monkeypatch.setattr(exporter, "match_onnx", lambda *_: match_onnx(8, (4, 4), torch.float32, 20))


@pytest.mark.parametrize(("name", "layer", "mode", "fp16", "changes"), BUNDLES)
def test_bundle(checkpoint, tmp_path, name, layer, mode, fp16, changes):
    metrics, bundle = parity(checkpoint(name), tmp_path, layer, mode, fp16, **changes)
    assert Bundle.open(bundle).manifest.text_padding == ("pipeline" if name == "chroma" else None)
    if fp16:
        assert metrics["cosine_mean"] > 0.999
        assert metrics["cosine_p01"] > 0.995
        check_what_enters_blocks(Bundle.open(bundle))
    else:
        assert metrics["cosine_p01"] > 0.99999
        assert metrics["relative_error"] < 1e-5  # another order of summation
    height, width = changes.get("size", (64, 64))
    profile = {"image": tuple((n, height, width, 3) for n in (1, 2, 4))} if "batch" in changes else None
    build_engine(bundle / "features.onnx", "sm_89", profile)


@pytest.mark.parametrize(
    "changes",
    [{"adaln": False}, {"discard_stage": "after"}],
    ids=["no-adaln", "discard-after"],
)
def test_ablations(checkpoint, tmp_path, changes):
    metrics, bundle = parity(checkpoint("pixart"), tmp_path, "2", "bake", True, **changes)
    assert metrics["cosine_p01"] > 0.995
    with ditf.load(bundle) as model:
        features = model.run(golden_pair((64, 64))[:1])
    if "adaln" in changes:
        assert features.dtype == np.float32  # z may not fit float16
    if changes.get("discard_stage") == "after":
        assert not features[:, 3].any()


def check_what_enters_blocks(bundle):
    """Values have one name each, and what enters every block is the unmodified model's."""
    graph = onnx.load(bundle.path / "features.onnx", load_external_data=False).graph
    names = [value for node in graph.node for value in node.output]
    assert len(names) == len(set(names))
    assert [n for n in names if n.startswith("hidden_states.")] == [
        f"hidden_states.{index}" for index in range(bundle.manifest.layer + 1)
    ]
    rounded_graph = widen(bundle.read_graph("features.onnx"), rounded=True)
    found = bisect(bundle, rounded_graph, bundle.read_arrays("golden.npz"), features_ok=True)
    assert found.place == ""
    # Rounding is that far from being called a fault: the same arithmetic, summed in another order.
    assert all(one.error < one.limit / 2 for one in found.boundaries)
    assert len(bundle.read_arrays("trace.npz")["names"]) > 10


def parity(folder, tmp_path, layer, mode, fp16, **changes):
    """The worst metrics over the conditions of a bundle, and its path."""
    settings = {"size": (64, 64), "discard": (3,), **changes}
    options = ExportOptions(
        model=str(folder),
        layer=layer,
        precision="float16" if fp16 else "float32",
        conditioning=mode,
        output=tmp_path / "bundle",
        **subjects(family_named(folder), 1 if mode == "bake" else 2),
        **settings,
    )
    bundle = export_bundle(options)
    images = photographs(settings["size"])
    plan = make_plan(options, Checkpoint(folder, str(folder)))
    oracle = Oracle(plan, own_pipeline(folder))
    chosen = FeatureSettings(options.discard, options.discard_stage, options.adaln)
    metrics = []
    with ditf.load(bundle) as model:
        assert model.manifest.golden["oracle"] == "independent"
        assert model.conditions == tuple(entry.name for entry in plan.entries)
        for entry in plan.entries:
            actual = model.run(images, prompt=entry.name)
            expected = np.stack(oracle.maps(entry, images, chosen))
            assert actual.shape == expected.shape
            metrics.append(feature_parity(actual.transpose(0, 2, 3, 1), expected.transpose(0, 2, 3, 1)))
    return worst(metrics), bundle
