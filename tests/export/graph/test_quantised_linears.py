"""INT8: Q/DQ linears, and factors that move for free."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from ditf.calib.parity import feature_parity
from ditf.calib.recipe import Recipe
from ditf.export.assemble.features_graph import assemble
from ditf.export.exporter import export_bundle
from ditf.export.graph.blocks.layers import Linear
from ditf.export.graph.precision import FLOAT32, INT8
from ditf.export.graph.quantised_linears import QuantisedLinear, dequantize, quantise, quantize
from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.bundles.manifest import read_manifest
from ditf.runtime.errors import InputError
from tests.checkpoints import planted
from tests.engines.rtx import build_engine
from tests.export.measure.test_activation_ranges import Measured
from tests.export.parity import SETTINGS, subjects
from tests.export.parity import family_named as family_of

CASES = [
    ("dit", "3", "bake"),
    ("dit", "3", "bank"),
    ("pixart", "3", "bake"),
    ("pixart", "2", "live"),
    ("sd35", "3", "bake"),
    ("sd3", "3", "bank"),
    ("flux", "4", "bake"),
    ("flux", "2", "live"),
    ("auraflow", "4", "bake"),
    ("auraflow", "1", "bank"),
    ("flux2", "4", "bake"),
    ("lumina2", "4", "bake"),
    ("lumina2", "4", "live"),
    ("zimage", "4", "bake"),
]


@pytest.mark.parametrize(("name", "layer", "mode"), CASES)
def test_every_family_and_that_smoothing_alone_changes_nothing(checkpoint, name, layer, mode):
    one = Measured(checkpoint(name), layer, mode)
    _, maxima = one.measure()
    quantised = one.parity(Recipe(), replace(INT8, maxima=maxima))
    # 8 bits of weights and of activations, a few blocks deep.
    assert quantised["cosine_p01"] > 0.99
    # A float32 trunk is smoothed, and has nothing to quantise.
    plain, smoothed = (
        assemble(replace(one.plan, precision=precision), one.entries, one.noise, SETTINGS)
        for precision in (FLOAT32, replace(FLOAT32, maxima=maxima))
    )
    assert not any(isinstance(m, QuantisedLinear) for m in smoothed.graph.modules())
    image = torch.from_numpy(one.images[0])[None]
    with torch.no_grad():
        maps = [made.graph(image, *made.feeds[0].values())[0].numpy() for made in (plain, smoothed)]
    assert not np.array_equal(*maps)
    assert feature_parity(maps[1].transpose(1, 2, 0), maps[0].transpose(1, 2, 0))["relative_error"] < 5e-6


@pytest.mark.parametrize(("name", "layer"), [("dit", "3"), ("flux", "4")])
def test_what_is_quantised(checkpoint, name, layer):
    one = Measured(checkpoint(name), layer)
    _, maxima = one.measure()
    precision = replace(INT8, maxima=maxima, recipe=Recipe(float32={"transformer_blocks.0.attn1": "a test"}))
    trunk = assemble(replace(one.plan, precision=precision), one.entries, one.noise, SETTINGS).graph.trunk
    kinds = {path: type(m) for path, m in trunk.named_modules() if isinstance(m, (Linear, QuantisedLinear))}
    if name == "dit":  # what the recipe keeps in float32 stays
        assert kinds["blocks.0.attention.project.linear"] is Linear
        assert kinds["blocks.0.feed_forward.up"] is QuantisedLinear
        assert list(kinds.values()).count(QuantisedLinear) == 10
    else:
        assert set(kinds.values()) == {QuantisedLinear}


def test_linears_of_the_residual_are_not_quantised(checkpoint):
    one = Measured(checkpoint("pixart"), "2")
    _, maxima = one.measure()
    plan = replace(one.plan, precision=replace(INT8, maxima=maxima))
    trunk = assemble(plan, one.entries, one.noise, SETTINGS).graph.trunk
    cross = [m for path, m in trunk.named_modules() if ".cross_attention." in path]
    assert any(isinstance(m, Linear) for m in cross)
    assert not any(isinstance(m, QuantisedLinear) for m in cross)


def test_smoothing_saves_what_massive_channels_ruin(checkpoint, tmp_path):
    """Massive values between the heads: one scale for the tensor leaves the others few steps.

    Those of one stream of two, because a bias of all values is never between the heads.
    """
    biases = {f"transformer_blocks.{i}.attn.add_v_proj": 300.0 for i in range(3)}
    folder = planted(checkpoint("sd3"), tmp_path / "planted", "transformer", biases)
    one = Measured(folder, "3")
    _, maxima = one.measure()
    naive = one.parity(Recipe(), replace(INT8, maxima=maxima, smooth=False))
    smoothed = one.parity(Recipe(), replace(INT8, maxima=maxima))
    assert smoothed["relative_error"] < naive["relative_error"] / 2


def test_quantize_is_onnx(tmp_path):
    """The eager arithmetic is QuantizeLinear's and DequantizeLinear's: ties to even, saturation."""
    x = torch.tensor([-2000.0, -1.5, -0.5, 0.5, 1.5, 2.5, 126.6, 2000.0])
    scale, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)
    expected = [-128, -2, 0, 0, 2, 2, 127, 127]
    assert quantize(x, scale, zero).tolist() == expected
    assert dequantize(quantize(x, scale, zero), scale, zero).tolist() == expected


def test_channels_that_are_always_zero():
    linear = Linear(torch.ones(4, 3), None, torch.float16)
    quantised = QuantisedLinear(linear, 0.0)
    assert torch.isfinite(quantised(torch.zeros(2, 3))).all()
    zero_weights = QuantisedLinear(Linear(torch.zeros(4, 3), None, torch.float16), 1.0)
    assert not zero_weights(torch.ones(2, 3)).any()


def test_a_trunk_of_no_blocks(checkpoint):
    one = Measured(checkpoint("dit"), "0")
    _, maxima = one.measure()
    assert maxima == {}
    assert quantise(torch.nn.Module(), maxima) == []


def test_the_bundle(int8_bundle):
    graph = onnx.load(int8_bundle / "features.onnx").graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantised = [name for name, array in weights.items() if array.dtype == np.int8 and array.ndim == 2]
    assert len(quantised) == 12  # four linears in each of three blocks
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = weights[node.input[1]], weights[node.input[2]]
            assert zero.dtype == np.int8  # left out, ONNX Runtime reads uint8
            assert not zero.any()
            assert (scale > 0).all()
    manifest = read_manifest(int8_bundle)
    assert manifest.precision == "int8"
    assert "int8" in manifest.recipe
    parts = manifest.parts["feed-forward"]
    assert parts["int8"]["bytes"] == parts["int8"]["parameters"]


def test_integer_kernels_run(int8_bundle, tmp_path):
    """ONNX Runtime's own profile, with the session options of the runtime."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        str(int8_bundle / "features.onnx"), options, disabled_optimizers=["MatMulAddFusion"]
    )
    kinds = [
        node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    ]
    assert kinds.count("MatMulIntegerToFloat") + kinds.count("QLinearMatMul") >= 12


def test_check_and_rtx(ditf, int8_bundle):
    done = ditf("check", int8_bundle, "--ladder", "--bisect")
    assert done.returncode == 0, done.stderr
    layers = build_engine(int8_bundle / "features.onnx", "sm_89").layers
    assert sum(layer.kind == "QUANTIZE" for layer in layers) == 12


def test_a_joint_bundle_from_a_calibration_file(ditf, checkpoint, tmp_path):
    model = checkpoint("flux")
    options = ("--model", model, "--layer", "3", "--size", "48x80", "--prompt", "a cat")
    assert ditf("calibrate", *options, "-o", "c.json").returncode == 0
    done = ditf("export", *options, "--precision", "int8", "--calibration", "c.json", "-o", "b")
    assert done.returncode == 0, done.stderr
    assert ditf("check", "b").returncode == 0
    build_engine(tmp_path / "b" / "features.onnx", "sm_89")


def test_an_opset_that_is_too_old(checkpoint, tmp_path):
    folder = checkpoint("dit")
    options = ExportOptions(
        model=str(folder), precision="int8", opset=18, output=tmp_path / "b", **subjects(family_of(folder), 1)
    )
    with pytest.raises(InputError, match="float16 inputs of QuantizeLinear need opset 19; leave --opset out"):
        export_bundle(options)
