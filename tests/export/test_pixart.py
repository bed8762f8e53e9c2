"""Tiny PixArt checkpoints, end to end: bundles on ONNX Runtime against the unmodified transformer."""

from __future__ import annotations

import numpy as np
import pytest

import ditf
from ditf.calib.images import golden_pair
from ditf.calib.parity import feature_parity
from ditf.export.checkpoint import open_checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.families import family_of
from ditf.export.noise import draw_noise
from ditf.export.options import ExportOptions
from ditf.export.reference import FeatureSettings, Reference
from tests.checkpoints import PIXART_BLOCKS

DEFAULT = {"size": (64, 64), "ensemble": 1, "noise": "baked"}


def parity(checkpoint, tmp_path, layer, fp16, discard=(3,), **changes):
    """Whole feature maps of a bundle against hooks on the unmodified model."""
    settings = {**DEFAULT, **changes}
    options = ExportOptions(
        model=str(checkpoint),
        layer=str(layer),
        fp16=fp16,
        discard=discard,
        output=tmp_path / "bundle",
        prompt="a cat",
        **settings,
    )
    with ditf.load(export_bundle(options)) as model:
        images = golden_pair(settings["size"])
        actual = model.run(images)
    with open_checkpoint(str(checkpoint)) as opened:
        family = family_of(opened)
        shape = (4, settings["size"][0] // 4, settings["size"][1] // 4)
        reference = Reference(
            opened,
            family,
            layer,
            family.encode_condition(opened, "a cat", None),
            family.defaults.timestep,
            settings["size"],
            draw_noise(settings["ensemble"], shape, 0),
        )
        chosen = FeatureSettings(channels=discard, stage=options.discard_stage, adaln=options.adaln)
        expected = np.stack([reference.features(reference.hidden_states(i), chosen) for i in images])
    assert actual.shape == expected.shape
    return feature_parity(actual.transpose(0, 2, 3, 1), expected.transpose(0, 2, 3, 1)), actual


@pytest.mark.parametrize("layer", range(PIXART_BLOCKS))
def test_float32_is_the_unmodified_model(tiny_pixart, tmp_path, layer):
    metrics, features = parity(tiny_pixart, tmp_path, layer, fp16=False)
    assert features.dtype == np.float32
    assert metrics["cosine_p01"] > 0.99999
    assert metrics["relative_error"] < 1e-5  # another order of summation


@pytest.mark.parametrize("layer", range(PIXART_BLOCKS))
def test_float16_stays_close(tiny_pixart, tmp_path, layer):
    metrics, features = parity(tiny_pixart, tmp_path, layer, fp16=True)
    assert features.dtype == np.float16
    assert metrics["cosine_mean"] > 0.999
    assert metrics["cosine_p01"] > 0.995


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"ensemble": 4},
        {"noise": "input"},
        {"size": (48, 80)},
        {"size": (80, 48), "ensemble": 2, "noise": "input", "batch": "dynamic"},
    ],
    ids=["ensemble", "noise-input", "not-square", "all-dynamic"],
)
def test_variants(tiny_pixart, tmp_path, fp16, changes):
    metrics, _ = parity(tiny_pixart, tmp_path, 2, fp16, **changes)
    assert metrics["cosine_p01"] > (0.995 if fp16 else 0.99999)
    assert metrics["cosine_mean"] > (0.999 if fp16 else 0.999999)


@pytest.mark.parametrize(
    "changes",
    [{"adaln": False}, {"discard_stage": "after"}, {"discard": ()}, {"adaln": False, "discard": ()}],
    ids=["no-adaln", "discard-after", "discard-none", "raw"],
)
def test_ablations(tiny_pixart, tmp_path, changes):
    metrics, features = parity(tiny_pixart, tmp_path, 2, fp16=True, **changes)
    assert metrics["cosine_p01"] > 0.995
    if "adaln" in changes:
        assert features.dtype == np.float32  # z may not fit float16
    if changes.get("discard_stage") == "after":
        assert not features[:, 3].any()
