"""A graph that is not the model in its own precision is not shipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditf.calib.recipe import Recipe
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.exporter import export_bundle
from ditf.export.onnx_writing.emulation import Float32Accumulation
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import GateFailed
from tests.checkpoints import save_untrained


def plant(folder, name, value):
    """An untrained DiT with a bias of one linear layer set to a value at one output."""
    save_untrained(folder)
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
        model=str(model), layer="2", timestep=10, precision="float16", size=(64, 64), output=tmp_path / "b"
    )
    manifest = read_manifest(export_bundle(options))
    assert 7 in manifest.discard["channels"]
    assert manifest.rehearsal["cosine_mean"] > 0.999


def test_a_branch_beyond_float16_is_scaled(tmp_path):
    """What a float16 GEMM cannot emit; ONNX Runtime's CPU kernels would hide it. 1e6: cli/test_export.py."""
    name = "transformer_blocks.0.ff.net.2"
    model = plant(tmp_path / "planted", name, 1e5)
    options = ExportOptions(
        model=str(model), layer="2", timestep=10, precision="float16", size=(64, 64), output=tmp_path / "b"
    )
    manifest = read_manifest(export_bundle(options))
    exceptions = [entry for entry in manifest.recipe["exceptions"] if entry["where"] == name]
    assert [entry["is"].startswith("scaled by 2**-") for entry in exceptions] == [True]
    assert manifest.rehearsal["cosine_mean"] > 0.999


def test_a_graph_that_overflows_all_the_same_is_not_shipped(tmp_path, monkeypatch):
    """Were the recipe wrong, the graph's own arithmetic would say so."""
    monkeypatch.setattr("ditf.export.exporter.choose_recipe", lambda extents: Recipe())
    model = plant(tmp_path / "planted", "transformer_blocks.0.ff.net.2", 1e6)
    options = ExportOptions(
        model=str(model), layer="2", timestep=10, precision="float16", size=(64, 64), output=tmp_path / "b"
    )
    with pytest.raises(GateFailed, match=r"the float16 graph does not match.*--precision fp32") as caught:
        export_bundle(options)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "b").exists()


def test_the_rehearsal_is_no_worse_than_the_check(demo_bundle):
    import ditf
    from ditf.cli.check import golden_metrics

    rehearsal = read_manifest(demo_bundle).rehearsal
    with ditf.load(demo_bundle) as model:
        metrics, _ = golden_metrics(model, model.bundle.read_arrays("golden.npz"))
    assert np.isclose(rehearsal["relative_error"], metrics["relative_error"], rtol=1.0)


@pytest.mark.parametrize("operation", ["matmul", "batched", "convolution", "with-bias"])
def test_products_are_float32_inside_and_rounded_once(operation):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=generator).half()

    call, arguments = {
        "matmul": (torch.matmul, (tensor(5, 64), tensor(64, 7))),
        "batched": (torch.matmul, (tensor(2, 3, 5, 64), tensor(2, 3, 64, 7))),
        "convolution": (torch.nn.functional.conv2d, (tensor(1, 8, 9, 9), tensor(4, 8, 3, 3), tensor(4))),
        "with-bias": (torch.nn.functional.linear, (tensor(5, 64), tensor(7, 64), tensor(7))),
    }[operation]
    with Float32Accumulation():
        actual = call(*arguments)
    assert actual.dtype == torch.float16
    assert torch.equal(actual, call(*(argument.float() for argument in arguments)).half())


def test_overflow_is_not_hidden():
    large = torch.full((1, 64), 200.0, dtype=torch.float16)
    with Float32Accumulation():
        assert torch.isinf(large @ large.T).all()
        assert ((large * 1e-2) @ large.T).isfinite().all()
    exact = torch.ones(2, 2)
    with Float32Accumulation():
        assert (exact @ exact).dtype == torch.float32
