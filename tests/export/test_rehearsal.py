"""A graph that is not the model in its own precision is not shipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditf.export import demo
from ditf.export.checkpoint import Checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.options import ExportOptions
from ditf.runtime.errors import GateFailed
from ditf.runtime.manifest import read_manifest


def plant(folder, name, value):
    """The demo checkpoint with a bias of one linear layer set to a value at one output."""
    demo.write_demo_checkpoint(folder)
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        model.get_submodule(name).bias[7] = value
    model.save_pretrained(folder / "transformer")
    return Checkpoint(folder, str(folder)).path


@pytest.mark.parametrize("value", [6e4, 1e6])
def test_massive_residuals_survive(tmp_path, value):
    """A residual beyond float16: it is float32, and the channel is found and discarded."""
    model = plant(tmp_path / "planted", "pos_embed.proj", value)
    options = ExportOptions(
        model=str(model), layer="2", timestep=10, fp16=True, size=(64, 64), output=tmp_path / "b"
    )
    manifest = read_manifest(export_bundle(options))
    assert 7 in manifest.discard["channels"]
    assert manifest.rehearsal["cosine_mean"] > 0.999


def test_a_branch_beyond_float16_is_refused(tmp_path):
    """What a float16 GEMM cannot emit; ONNX Runtime's CPU kernels would hide it."""
    model = plant(tmp_path / "planted", "transformer_blocks.0.ff.net.2", 1e6)
    options = ExportOptions(
        model=str(model), layer="2", timestep=10, fp16=True, size=(64, 64), output=tmp_path / "b"
    )
    with pytest.raises(GateFailed, match=r"the float16 graph does not match.*without --fp16") as caught:
        export_bundle(options)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "b").exists()


def test_the_rehearsal_is_no_worse_than_the_check(demo_bundle):
    import ditf
    from ditf.cli.check import golden_metrics

    rehearsal = read_manifest(demo_bundle).rehearsal
    with ditf.load(demo_bundle) as model:
        metrics = golden_metrics(model)
    assert np.isclose(rehearsal["relative_error"], metrics["relative_error"], rtol=1.0)
