"""Models whose weights stay on disk give the very bits of those in memory."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ditf.calib.images import procedural_image
from ditf.export.checkpoints import offload
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import encode
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.errors import InputError
from tests.checkpoints import SAVE

SIZE, LAYER = (48, 80), 2


def plan_of(folder):
    options = ExportOptions(model=str(folder), layer=str(LAYER), size=SIZE, ensemble=2)
    return make_plan(options, Checkpoint(folder, str(folder)))


def condition_of(plan):
    with torch.no_grad():
        return encode(plan.entries, plan.family, plan.checkpoint, plan.guidance)[0]


def observed(plan, entry):
    """What enters each block, x_k and the feature; and the model."""
    reference = Reference(plan.checkpoint, plan.family, plan.layer, plan.size, plan.noise())
    reference.under(entry.condition, entry.timestep)
    image = procedural_image(SIZE, 0)
    entering = []
    reference.trace(image, lambda layer, found: entering.append(found.image.copy()))
    hidden_states = reference.hidden_states(image)
    features = reference.features(hidden_states, FeatureSettings((3,)))
    again = reference.hidden_states(image)
    return [*entering, hidden_states, features, again], reference._transformer


@pytest.mark.parametrize("name", SAVE)
def test_the_reference_is_the_same_bits(checkpoint, monkeypatch, name):
    plan = plan_of(checkpoint(name))
    entry = condition_of(plan)
    resident, model = observed(plan, entry)
    assert not any(parameter.is_meta for parameter in model.parameters())
    monkeypatch.setattr(offload, "RESIDENT", 0)
    offloaded, model = observed(plan, entry)
    for actual, expected in zip(offloaded, resident, strict=True):
        np.testing.assert_array_equal(actual, expected)
    # What the model and its blocks own themselves, small tables, may stay when a hook leaves the pass.
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(parameter.is_meta for linear in linears for parameter in linear.parameters())


def test_only_blocks_up_to_the_layer_are_read(checkpoint, monkeypatch):
    monkeypatch.setattr(offload, "RESIDENT", 0)
    plan = plan_of(checkpoint("flux"))
    opened = []
    weights = Checkpoint.weights
    monkeypatch.setattr(
        Checkpoint, "weights", lambda self, component: opened.append(weights(self, component)) or opened[-1]
    )
    observed(plan, condition_of(plan))
    read = set().union(*(one.read for one in opened))
    later = [plan.family.block_name(index) for index in range(LAYER + 1, plan.family.blocks.count)]
    assert any(name.startswith(plan.family.block_name(LAYER)) for name in read)
    assert later
    assert not [name for name in read if name.startswith(tuple(f"{block}." for block in later))]


def test_a_damaged_tensor_is_found_when_it_is_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "RESIDENT", 0)
    copy = shutil.copytree(checkpoint("flux"), tmp_path / "checkpoint")
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.1.ff.net.2.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    plan = plan_of(copy)
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.ff\.net\.2\.weight .* holds NaN"):
        observed(plan, condition_of(plan))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["pixart", "sd35", "flux", "auraflow", "flux2", "lumina2"])
def test_text_encoders_are_the_same_bits(checkpoint, tmp_path, monkeypatch, name, stored):
    folder = checkpoint(name)
    if stored == torch.bfloat16:
        folder = shutil.copytree(folder, tmp_path / "checkpoint")
        for path in folder.glob("text_encoder*/*.safetensors"):
            tensors = {key: tensor.to(stored) for key, tensor in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})
        for path in folder.glob("text_encoder*/config.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    plan = plan_of(folder)
    resident = condition_of(plan).condition
    monkeypatch.setattr(offload, "RESIDENT", 0)
    offloaded = condition_of(plan).condition
    assert resident.keys() == offloaded.keys()
    for key, tensor in resident.items():
        assert torch.equal(tensor, offloaded[key]), key
