"""`calibrate` observes the unmodified model, and an export takes what it wrote."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ditf.calib.images import procedural_image
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.families.base import TrunkSpec
from ditf.export.graph.features import FeatureSettings
from ditf.export.graph.precision import FLOAT32
from ditf.export.measure.calibrate import calibrate, calibration_stage_count, observe_blocks
from ditf.export.measure.calibration import Calibration, measured_for
from ditf.export.measure.images import CalibrationImages
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import InputError
from tests.export.parity import planned


def trace_of(reference, image):
    """What enters each block, in order."""
    trace = []
    reference.trace(image, lambda layer, entering: trace.append(entering) if layer == len(trace) else None)
    return trace


LAST = [
    ("dit", "3"),
    ("pixart", "2"),
    ("sd35", "3"),
    ("flux", "4"),
    ("auraflow", "4"),
    ("flux2", "4"),
    ("lumina2", "4"),
    ("zimage", "4"),
]


@pytest.mark.parametrize(("name", "layer"), LAST)
def test_a_trace_is_what_hooks_on_one_block_see(checkpoint, name, layer):
    folder = checkpoint(name)
    plan, entries = planned(folder, layer, (48, 80), 2, 1, "bake", False)
    image = procedural_image((48, 80), 3)
    reference = Reference(plan.checkpoint, plan.family, plan.layer, plan.size, plan.noise())
    trace = trace_of(reference.under(entries[0].condition, entries[0].timestep), image)
    assert len(trace) == plan.layer + 1
    np.testing.assert_array_equal(trace[-1].image, reference.hidden_states(image))
    assert (trace[-1].text is None) == (name in ("dit", "pixart"))
    one = Reference(plan.checkpoint, plan.family, 1, plan.size, plan.noise())
    one.under(entries[0].condition, entries[0].timestep)
    np.testing.assert_array_equal(trace[1].image, one.hidden_states(image))


def test_the_scale_is_the_blocks_own(checkpoint):
    """Against the feature of a single noise: F = (1 + scale) Norm(z) + shift."""
    plan, entries = planned(checkpoint("sd3"), "2", (48, 80), 1, 1, "bake", False)
    image = procedural_image((48, 80), 3)
    reference = Reference(plan.checkpoint, plan.family, 2, plan.size, plan.noise())
    reference.under(entries[0].condition, entries[0].timestep)
    last = trace_of(reference, image)[-1]
    feature = reference.features(reference.hidden_states(image), FeatureSettings())
    np.testing.assert_allclose(last.modulated.T.reshape(feature.shape), feature, rtol=1e-4, atol=1e-5)


def test_the_scale_of_an_rms_norm(checkpoint):
    """F = (1 + scale) weight z / rms(z), which no mean enters."""
    plan, entries = planned(checkpoint("lumina2"), "3", (48, 80), 1, 1, "bake", False)
    reference = Reference(plan.checkpoint, plan.family, 3, plan.size, plan.noise())
    found = observe_blocks(
        plan,
        reference.under(entries[0].condition, entries[0].timestep),
        CalibrationImages(None, plan.size),
    )
    weights = plan.checkpoint.weights("transformer")
    with torch.no_grad():
        conditioner = plan.family.conditioner(weights, TrunkSpec(3, plan.size, plan.grid, 256, FLOAT32))
        given = conditioner(torch.tensor([entries[0].timestep]), entries[0].condition)
    expected = (1 + given["modulation"][-1]) * weights.tensor("layers.1.norm1.norm.weight")
    scale = found.calibration.document["layers"][3]["scale"]
    np.testing.assert_allclose(scale, expected, rtol=1e-3, atol=1e-4)  # the file has four digits


@pytest.fixture(scope="module")
def calibration(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    path.write_text(json.dumps(calibrate(options(checkpoint("flux"))).to_json()))
    return path


def options(folder, **changes):
    return ExportOptions(model=str(folder), layer="3", size=(48, 80), prompt="a cat", **changes)


def test_every_block_is_there(calibration):
    document = json.loads(calibration.read_text())
    assert [layer["name"] for layer in document["layers"]] == ["double.0", "double.1", "single.0", "single.1"]
    assert document["images"]["count"] == 6
    assert all(layer["text"] for layer in document["layers"])
    assert all(len(layer["scale"]) == len(layer["image"]["mean_abs"]) == 48 for layer in document["layers"])


def test_reading_a_calibration_and_writing_it_again_changes_no_byte(calibration):
    document = json.loads(calibration.read_text())
    again = Calibration.from_json(document)
    assert json.dumps(again.to_json()) == json.dumps(document)
    assert again.massive_channels == []
    assert len(again.extents) == len(document["ranges"])
    assert {name: len(values) for name, values in document["inputs"].items()} == {
        name: len(values) for name, values in again.maxima.items()
    }


def test_every_image_is_a_stage(checkpoint):
    lines = []
    given = options(checkpoint("flux"))
    calibrate(given, lines.append)
    assert len(lines) == calibration_stage_count(given) == 8
    assert lines[1] == "image 1 of 6: procedural 0"


def test_an_export_takes_the_channels_of_the_file(checkpoint, calibration, tmp_path):
    document = json.loads(calibration.read_text())
    document["layers"][-1]["image"]["massive_channels"] = [{"channel": 11}, {"channel": 30}]
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(document))
    bundle = export_bundle(options(checkpoint("flux"), calibration=edited, output=tmp_path / "bundle"))
    assert read_manifest(bundle).discard["channels"] == [11, 30]
    assert json.loads((bundle / "calibration.json").read_text()) == document


def test_a_calibration_is_of_weights_wherever_they_lie(checkpoint, tmp_path):
    def of(folder):
        return measured_for(make_plan(options(folder), Checkpoint(folder, str(folder))))

    model = checkpoint("flux")
    shutil.copytree(model, tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere") == of(model)
    path = tmp_path / "elsewhere" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["x_embedder.weight"] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert of(tmp_path / "elsewhere") != of(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 2}, "has layer 2 instead of 3"),
        ({"timestep": 5}, "has timestep 5 instead of 260"),
        ({"size": [64, 64]}, r"has size \[64, 64\] instead of \[48, 80\]"),
        ({"conditions": ["a dog"]}, r"has conditions \['a dog'\] instead of \['a cat'\]"),
        ({"conditioning": "live"}, "has conditioning 'live' instead of 'bake'"),
        ({"ranges": [{"name": "x"}]}, "is no calibration"),
        ({"weights": "0" * 16}, "has weights '0000000000000000' instead of"),
        ({"guidance": 7.0}, r"has guidance 7\.0 instead of 3\.5"),
        ({"layers": []}, "is no calibration"),
        ({"layers": [{"image": {"massive_channels": [{"channel": 4800}]}}]}, "is no calibration"),
        ({"layers": 3}, "is no calibration"),
    ],
)
def test_files_of_something_else(checkpoint, calibration, tmp_path, change, message):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(calibration.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        export_bundle(
            options(checkpoint("flux"), calibration=other, precision="float16", output=tmp_path / "bundle")
        )
    other.write_text("{")
    with pytest.raises(InputError, match="is no calibration"):
        export_bundle(
            options(checkpoint("flux"), calibration=other, precision="float16", output=tmp_path / "bundle")
        )
    assert not (tmp_path / "bundle").exists()


def test_a_float32_bundles_calibration_has_no_ranges(checkpoint, calibration, tmp_path):
    document = json.loads(calibration.read_text())
    del document["ranges"], document["inputs"]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(document))
    half = options(checkpoint("flux"), calibration=bare, precision="float16", output=tmp_path / "bundle")
    with pytest.raises(
        InputError, match="has no ranges: it is a float32 bundle's; make one with ditf calibrate"
    ):
        export_bundle(half)
    export_bundle(options(checkpoint("flux"), calibration=bare, output=tmp_path / "bundle"))


@pytest.mark.parametrize("kind", ["a FIFO", "8,589,934,592 bytes", "nested too deeply"])
def test_a_calibration_is_a_plain_file_of_bounded_size(checkpoint, tmp_path, kind):
    path = tmp_path / "calibration.json"
    if kind == "a FIFO":
        os.mkfifo(path)
    else:
        path.write_text("[" * 100_000)
    if kind.startswith("8"):
        os.truncate(path, 8 << 30)
    with pytest.raises(InputError, match=f"is no calibration .*{kind}"):
        export_bundle(options(checkpoint("flux"), calibration=path, output=tmp_path / "bundle"))
