"""Quantised files in the layouts of their authors: dequantised, then given under the names of diffusers."""

from __future__ import annotations

import gguf
import pytest
import torch
from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel
from diffusers.quantizers.gguf.utils import GGUFParameter
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints.opening import open_checkpoint
from ditf.runtime.errors import InputError
from tests.original_layouts import original, original_of

CLASS = "SD3Transformer2DModel"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_gguf_as_diffusers_reads_it(checkpoint, tmp_path):
    folder = checkpoint("sd35")
    file = tmp_path / "sd3.5-Q8_0.gguf"
    writer = gguf.GGUFWriter(file, "sd3")
    for name, tensor in original_of(folder, CLASS).items():
        kind = gguf.GGMLQuantizationType.F32
        if tensor.ndim == 2 and tensor.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    judge = SD3Transformer2DModel.from_single_file(
        str(file),
        config=str(folder / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    expected = dict(judge.named_parameters()) | dict(judge.named_buffers())
    expected = {name: expected[name] for name in judge.state_dict()}
    with open_checkpoint(str(file), base=str(folder)) as opened:
        weights = opened.weights("transformer")
    assert weights.shapes.keys() == expected.keys()
    quantised = 0
    for name, value in expected.items():
        if isinstance(value, GGUFParameter):
            quantised += value.quant_type == gguf.GGMLQuantizationType.Q8_0
            # diffusers' own function rounds to the type of the blocks' scales, float16
            value = torch.from_numpy(gguf.quants.dequantize(value.as_tensor().numpy(), value.quant_type))
        assert torch.equal(weights.tensor(name), value.float().reshape(weights.shapes[name])), name
    assert quantised > 5
    message = r"add --base stabilityai/stable-diffusion-3\.5-medium"
    with pytest.raises(InputError, match=message), open_checkpoint(str(file)):
        pass


def test_fp8_with_scales_as_comfyui_writes_it(checkpoint, tmp_path):
    folder = checkpoint("sd35")
    tensors = load_file(folder / WEIGHTS)
    stored, expected = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in original(CLASS, tensors).items():
        if tensor.ndim == 2 and name.startswith("joint_blocks"):
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
            expected[name] = stored[name].float() * scale
        else:
            stored[name] = expected[name] = tensor
    file = tmp_path / "sd3.5_fp8_scaled.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}, file)
    with open_checkpoint(str(file), base=str(folder)) as opened:
        weights = opened.weights("transformer")
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = original(CLASS, {name: weights.tensor(name) for name in weights.shapes})
    assert all(torch.equal(found[name], value) for name, value in expected.items())
