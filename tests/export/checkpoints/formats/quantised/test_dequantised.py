"""Quantised weights are the numbers that their library makes of them, or are refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers.quantizers.bfl.utils import dequantize_fp8r, quantize_fp8r
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from ditf.calib.parity import feature_parity
from ditf.export.assemble.features_graph import assemble
from ditf.export.assemble.parameter_counts import removed_parts
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.estimate.memory import stage_bytes
from ditf.export.planning.conditions import trim
from ditf.runtime.errors import InputError
from tests.export import parity
from tests.export.checkpoints.formats.quantised.quantised_files import (
    CASES,
    FP8,
    LAYER,
    note,
    opened,
    quantise,
    quantised_copy,
)


@pytest.mark.parametrize("case", CASES)
def test_what_libraries_store(tmp_path, case):
    config, state, expected = CASES[case]
    weights = opened(tmp_path, {LAYER + name: tensor for name, tensor in state.items()}, config)
    names = {f"{LAYER}weight"} | ({f"{LAYER}bias"} if "bias" in state else set())
    assert weights.shapes.keys() == weights.bytes_of.keys() == weights.dtypes.keys() == names
    assert weights.shapes[f"{LAYER}weight"] == expected.shape
    assert weights.dtypes[f"{LAYER}weight"] == "F32"
    assert sum(weights.bytes_of.values()) == sum(value.nbytes for value in state.values())
    tensor = weights.tensor(f"{LAYER}weight")
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    for start, stop in ((0, 1), (1, 3), (2, len(expected))):
        assert torch.equal(weights.rows(f"{LAYER}weight", start, stop), tensor[start:stop])


@pytest.mark.parametrize("case", [case for case in CASES if "block" not in case and "-group" not in case])
def test_what_libraries_store_without_their_config(tmp_path, case):
    """int8 with `weight_scale` is read only where the config says that its scale is a factor."""
    _, state, expected = CASES[case]
    if case == "int8-channel":
        with pytest.raises(InputError, match="is I8 and has the scale weight_scale; take the bf16"):
            opened(tmp_path, state)
        return
    torch.testing.assert_close(opened(tmp_path, state).tensor("weight"), expected, rtol=1e-6, atol=1e-7)


def test_blocks_that_the_config_does_not_give(tmp_path):
    _, state, _ = CASES["fp8-block"]
    with pytest.raises(InputError, match=r"its shape is \[24, 32\], that of weight_scale \[3, 2\]"):
        opened(tmp_path, state)


def comfy(kind, weight):
    """The tensors and the metadata of a layer that ComfyUI's tools have quantised."""
    dtype = {"e5m2": torch.float8_e5m2, "int8": torch.int8}.get(kind, FP8)
    values, scale = quantise(weight, {"e5m2": 57344.0, "int8": 127.0}.get(kind, 448.0), dtype)
    name = "weight_scale" if kind in ("noted", "metadata", "int8") else "scale_weight"
    tensors = {f"{LAYER}weight": values, f"{LAYER}{name}": scale, f"{LAYER}scale_input": torch.tensor(3.0)}
    if kind in ("marked", "e5m2"):
        tensors["scaled_fp8"] = torch.zeros(2).to(dtype)
    if kind in ("noted", "int8"):
        form = "int8_tensorwise" if kind == "int8" else "float8_e4m3fn"
        tensors[f"{LAYER}comfy_quant"] = note(format=form, full_precision_matrix_mult=True)
    layers = {"layers": {LAYER.rstrip("."): {"format": "float8_e4m3fn"}}}
    return tensors, {"_quantization_metadata": json.dumps(layers)} if kind == "metadata" else None


@pytest.mark.parametrize("kind", ["marked", "unmarked", "e5m2", "noted", "metadata", "int8"])
def test_scales_of_comfyui(tmp_path, kind):
    """ComfyUI multiplies: `weight * self.scale_weight` in ops.py, `plain_tensor * scale` in quant_ops.py."""
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)) / 50
    tensors, metadata = comfy(kind, weight)
    weights = opened(tmp_path, tensors, metadata=metadata)
    assert list(weights.shapes) == [f"{LAYER}weight"]
    tensor = weights.tensor(f"{LAYER}weight")
    error = (tensor - weight).abs() / weight.abs().max()
    assert error.max() < {"e5m2": 0.13, "int8": 0.005}.get(kind, 0.04)
    stored = next(value for name, value in tensors.items() if name.endswith("weight"))
    scale = next(value for name, value in tensors.items() if name.endswith(("weight_scale", "scale_weight")))
    torch.testing.assert_close(tensor, stored.double().mul(scale).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(256, 384), (192, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_transformers(tmp_path, shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(FP8)
    scale = torch.rand(2, -(-shape[1] // 128), generator=torch.Generator().manual_seed(3)).to(dtype)
    stored = {f"{LAYER}weight": values, f"{LAYER}weight_scale_inv": scale}
    expected = _dequantize_fp8_weight(values, scale, [128, 128], torch.float32)
    if shape == (256, 384):
        exact = Fp8Dequantize(None)._dequantize_one(values, scale, torch.float32)
        torch.testing.assert_close(expected, exact)
    for config in (None, {"quant_method": "fp8", "weight_block_size": [128, 128]}):
        weights = opened(tmp_path, stored, config)
        torch.testing.assert_close(weights.tensor(f"{LAYER}weight"), expected, rtol=1e-6, atol=0)
        assert torch.equal(
            weights.rows(f"{LAYER}weight", 100, 150), weights.tensor(f"{LAYER}weight")[100:150]
        )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_transformers(tmp_path, shape):
    values, scale = torch.randn(8, 8).to(FP8), torch.full(shape, 0.25)
    stored = {"q.weight": values, "q.weight_scale_inv": scale, "q.activation_scale": torch.tensor(2.0)}
    weights = opened(tmp_path, stored, {"quant_method": "fp8", "activation_scheme": "static"})
    assert torch.equal(weights.tensor("q.weight"), values.float() / 4)


def test_scales_of_rows(tmp_path):
    weight = torch.randn(20, 12)
    values, scale = quantize_fp8r(weight)
    for stored in (scale, scale[:, None]):
        tensor = opened(tmp_path, {"q.weight": values, "q.weight_scale": stored}).tensor("q.weight")
        torch.testing.assert_close(tensor, dequantize_fp8r(values, scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_plain_fp8_is_a_type(tmp_path, dtype):
    stored = {"q.weight": torch.randn(8, 8).to(dtype), "q.bias": torch.randn(8).to(dtype)}
    weights = opened(tmp_path, stored)
    assert weights.shapes == {"q.weight": (8, 8), "q.bias": (8,)}
    assert all(torch.equal(weights.tensor(name), value.float()) for name, value in stored.items())


def test_layers_that_comfyui_left_alone(tmp_path):
    """In a file that ComfyUI has marked, a weight without a scale is plain."""
    stored = {
        **{"scaled_fp8": torch.zeros(0).to(FP8), "a.weight": torch.ones(4, 4).to(FP8)},
        **{"a.scale_weight": torch.tensor(0.5), "b.weight": torch.ones(4, 4).to(FP8)},
        **{"b.scale_input": torch.tensor(2.0), "c.weight": torch.ones(4).to(torch.bfloat16)},
    }
    weights = opened(tmp_path, stored)
    assert sorted(weights.shapes) == ["a.weight", "b.weight", "c.weight"]
    assert weights.tensor("a.weight").unique().item() == 0.5
    assert weights.tensor("b.weight").unique().item() == 1


def test_names_of_models_are_no_companions(tmp_path):
    """Parameters called scale are FLUX's, PixArt's and CLIP's own; position ids are whole numbers."""
    stored = {
        **{"img_attn.norm.query_norm.scale": torch.ones(8), "scale_shift_table": torch.ones(2, 8)},
        **{"logit_scale": torch.ones(()), "norm_q.weight": torch.ones(8), "bn.running_var": torch.ones(8)},
        **{"embeddings.position_ids": torch.arange(8), "spiece_model": torch.zeros(9, dtype=torch.uint8)},
    }
    weights = opened(tmp_path, stored)
    assert weights.shapes.keys() == stored.keys()
    for name in ("embeddings.position_ids", "spiece_model"):
        with pytest.raises(
            InputError, match=rf"tensor {name} .* is stored as (I64|U8), not as floating-point"
        ):
            weights.tensor(name)


def test_nan_of_fp8_is_found(tmp_path):
    values = torch.full((4, 4), 0x7F, dtype=torch.uint8).view(FP8)
    weights = opened(tmp_path, {"a.weight": values, "a.weight_scale": torch.ones(())})
    with pytest.raises(InputError, match=r"tensor a\.weight of .* holds NaN or infinity"):
        weights.tensor("a.weight")


@pytest.mark.parametrize("kind", ["int8", "comfy", "inv"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_every_component(tiny_pixart, tmp_path, component, kind):
    """On the parent commit int8 was 915 and FP8 2062 times too large in a text encoder."""
    names = quantised_copy(tiny_pixart, tmp_path / "q", component, kind)
    plain, weights = (Checkpoint(folder, "x").weights(component) for folder in (tiny_pixart, tmp_path / "q"))
    assert names
    assert weights.shapes == plain.shapes
    for name in plain.shapes:
        expected = plain.tensor(name)
        error = (weights.tensor(name) - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < ((0.01 if kind == "int8" else 0.04) if name in names else 1e-6)
    path = next((tmp_path / "q" / component).glob("*.safetensors"))
    parameters, stored = Checkpoint(tmp_path / "q", "x").stored(component)
    assert parameters == sum(map(plain.numel, plain.shapes))
    assert stored == sum(tensor.nbytes for tensor in load_file(path).values())


def test_the_fingerprint_sees_scales(tmp_path, tiny_pixart):
    quantised_copy(tiny_pixart, tmp_path / "q", "transformer", "comfy")
    shutil.copytree(tmp_path / "q", tmp_path / "same")
    shutil.copytree(tmp_path / "q", tmp_path / "other")
    path = next((tmp_path / "other" / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["transformer_blocks.0.attn1.to_q.scale_weight"] *= 2
    save_file(tensors, path)
    first, same, other = (
        Checkpoint(tmp_path / name, "x").weights("transformer").fingerprint()
        for name in ("q", "same", "other")
    )
    assert first == same != other


@pytest.mark.parametrize("kind", ["int8", "comfy", "inv"])
def test_a_quantised_transformer_is_exported(tiny_pixart, tmp_path, kind):
    """The judge is the unmodified model with weights that are dequantised here, loaded by diffusers."""
    names = quantised_copy(tiny_pixart, tmp_path / "q", "transformer", kind)
    twin = shutil.copytree(tiny_pixart, tmp_path / "twin")
    path = next((twin / "transformer").glob("*.safetensors"))
    plain, tensors = load_file(path), load_file(tmp_path / "q" / "transformer" / path.name)
    for name in names:
        if kind == "int8":
            plain[name] = tensors[name] * tensors[f"{name.removesuffix('weight')}SCB"][:, None] / 127
        else:
            scale = "scale_weight" if kind == "comfy" else "weight_scale_inv"
            plain[name] = tensors[name].float() * tensors[name.removesuffix("weight") + scale]
    save_file(plain, path)
    plan, entries = parity.planned(tmp_path / "q", "2", (48, 80), 1, 1, "bake", False)
    made = assemble(plan, trim(entries, plan.family, False), plan.noise(), parity.SETTINGS)
    with torch.no_grad():
        actual = made.graph(torch.from_numpy(parity.photographs((48, 80))[:1]))[0].numpy()
    reference = parity.expected(twin, "2", (48, 80), 1, 1)[0]
    assert feature_parity(actual.transpose(1, 2, 0), reference.transpose(1, 2, 0))["cosine_p01"] > 0.99999
    # The weights are those of the quantised file, not the ones that it was made from.
    before = parity.expected(tiny_pixart, "2", (48, 80), 1, 1)[0]
    assert feature_parity(actual.transpose(1, 2, 0), before.transpose(1, 2, 0))["cosine_p01"] < 0.99999


def test_estimates_of_a_quantised_checkpoint(tiny_pixart, tmp_path):
    """Memory is that of the float32 numbers; what was left out is counted as stored."""
    for component in ("transformer", "text_encoder"):
        source = tmp_path / "transformer" if component == "text_encoder" else tiny_pixart
        quantised_copy(source, tmp_path / component, component, "comfy")
    found = []
    for folder in (tiny_pixart, tmp_path / "text_encoder"):
        plan, entries = parity.planned(folder, "2", (48, 80), 1, 1, "bake", False)
        made = assemble(plan, trim(entries, plan.family, False), plan.noise(), parity.SETTINGS)
        found.append((stage_bytes(plan, made.graph, 1000), removed_parts(plan, made)))
    (plain_stages, plain_removed), (stages, removed) = found
    assert stages == plain_stages
    for step, count in removed.items():
        assert count["parameters"] == plain_removed[step]["parameters"]
    for step in ("blocks 2.. and the final layer", "text encoders"):
        assert removed[step]["bytes"] < 0.6 * plain_removed[step]["bytes"]
