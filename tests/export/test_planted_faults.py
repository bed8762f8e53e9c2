"""Faults in what the exporter reads: the checkpoint's own pipeline finds them, the streamed reference cannot.

Each fault is planted where graph and reference share it. An export whose golden outputs come from the
pipeline then fails before anything is traced.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ditf.export import exporter
from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.export.exporter import export_bundle
from ditf.export.families.flux import Flux
from ditf.export.families.pooled_conditioner import PooledConditioner
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.errors import GateFailed


class Traced(Exception):
    """The export has passed its gates and begins to trace."""


@pytest.fixture
def options(checkpoint, tmp_path):
    return ExportOptions(
        model=str(checkpoint("flux")),
        layer="3",
        size=(48, 64),
        prompt=("a cat",),
        discard="none",
        output=tmp_path / "bundle",
    )


@pytest.fixture
def untraced(monkeypatch):
    def trace(self):
        raise Traced

    monkeypatch.setattr(exporter._Export, "trace", trace)
    monkeypatch.setattr(exporter._Export, "calibrate", lambda self: None)  # nothing is discarded


def noise(patch):
    """Noise levels of another timestep."""
    changed_plan(patch, lambda plan: replace(plan, levels=plan.levels.roll(60, 0)))
    add_noise = Reference._add_noise

    def add_other_noise(self, x_0):
        self._timestep -= 60
        try:
            return add_noise(self, x_0)
        finally:
            self._timestep += 60

    patch.setattr(Reference, "_add_noise", add_other_noise)


def text(patch):
    """Text embeddings of an encoder whose weights were not scaled."""
    encode = exporter.encode

    def encode_wrongly(*args):
        entries = encode(*args)
        return tuple(
            replace(e, condition={**e.condition, "prompt_embeds": e.condition["prompt_embeds"] * 1.5})
            for e in entries
        )

    patch.setattr(exporter, "encode", encode_wrongly)


def vae_shift(patch):
    """Latents whose shift is forgotten."""

    def change(plan):
        latents = replace(plan.latents, shift=0.0)
        return replace(plan, latents=latents, own_latents=latents)

    changed_plan(patch, change)


def timestep_scale(patch):
    """A timestep that is off by a tenth in the model."""
    forward, inputs = PooledConditioner.forward, Flux.reference_inputs
    patch.setattr(PooledConditioner, "forward", lambda self, t, given: forward(self, t * 1.1, given))
    patch.setattr(Flux, "reference_inputs", lambda self, given, t, *rest: inputs(self, given, t * 1.1, *rest))


def tensor(patch):
    """A tensor that is read wrongly: rows in another order."""
    load = SafetensorsWeights._load

    def load_wrongly(self, name):
        found = load(self, name)
        return found.flip(0) if name == "transformer_blocks.0.attn.to_v.weight" else found

    patch.setattr(SafetensorsWeights, "_load", load_wrongly)


def changed_plan(patch, change):
    make_plan = exporter.make_plan
    patch.setattr(exporter, "make_plan", lambda *args: change(make_plan(*args)))


SHARED = [noise, text, vae_shift, timestep_scale]
by_name = pytest.mark.parametrize("fault", SHARED, ids=lambda fault: fault.__name__)


def test_no_fault(options, untraced):
    """Nor is the caller's random state changed: the pipelines draw numbers that nobody reads."""
    before = torch.get_rng_state()
    with pytest.raises(Traced):
        export_bundle(options)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("fault", [*SHARED, tensor], ids=lambda fault: fault.__name__)
def test_the_pipeline_finds_it(options, untraced, monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises(GateFailed, match="the float32 graph does not match the model"):
        export_bundle(options)
    assert not options.output.exists()


@by_name
def test_the_streamed_reference_does_not(options, untraced, monkeypatch, fault):
    fault(monkeypatch)
    monkeypatch.setattr(exporter, "why_not", lambda *_: "asked for")
    with pytest.raises(Traced):
        export_bundle(options)


def test_a_bundle_with_a_fault_that_its_golden_data_share(options, ditf, monkeypatch):
    with monkeypatch.context() as patch:
        text(patch)
        patch.setattr(exporter, "why_not", lambda *_: "asked for")
        bundle = export_bundle(options)
    golden = json.loads((bundle / "manifest.json").read_text())["golden"]
    assert (golden["oracle"], golden["reason"]) == ("streamed", "asked for")
    assert ditf("check", bundle).returncode == 0
    done = ditf("check", bundle, "--independent", "--json", "check.json")
    assert done.returncode == 1, done.stderr
    assert "does not match its model: cosine_mean" in done.stderr
    report = json.loads((bundle.parent / "check.json").read_text())
    assert report["independent"]["text"] == "FluxPipeline.encode_prompt"
    assert report["metrics"]["relative_error"] > 1e-2
