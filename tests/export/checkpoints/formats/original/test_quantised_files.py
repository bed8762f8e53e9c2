"""FP8 and GGUF files in the layouts of their authors: diffusers' own single-file loader is the judge."""

from __future__ import annotations

import diffusers
import gguf
import pytest
import torch
from diffusers import GGUFQuantizationConfig
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from tests.export.checkpoints.formats.original.test_layout import JUDGED, class_of, read
from tests.export.checkpoints.formats.original.test_layout import tiny_widths as tiny_widths
from tests.export.checkpoints.formats.quantised.quantised_files import quantise
from tests.export.checkpoints.formats.test_gguf import write
from tests.original_layouts import original_of

pytestmark = [
    pytest.mark.usefixtures("tiny_widths"),
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),  # of diffusers, about its own class
]


def judged(file, folder, **options):
    """{name: tensor} of the model that diffusers makes of a file, in float32."""
    model = getattr(diffusers, class_of(folder)).from_single_file(
        str(file),
        config=str(folder / "transformer"),
        local_files_only=True,
        torch_dtype=torch.float32,
        **options,
    )
    return {name: decoded(tensor) for name, tensor in model.state_dict().items()}


def decoded(tensor):
    """The numbers of a tensor of diffusers, which decodes blocks in the type that a pipeline computes in."""
    if not isinstance(tensor, GGUFParameter):
        return tensor
    block, size = gguf.GGML_QUANT_SIZES[tensor.quant_type]
    blocks = tensor.as_tensor().view(torch.uint8).reshape(-1, size)
    values = dequantize_functions[tensor.quant_type](blocks, block, size, torch.float32)
    return values.reshape(*tensor.shape[:-1], -1)


def assert_same(weights, expected):
    assert weights.shapes == {name: tuple(value.shape) for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(weights.tensor(name), value, rtol=1e-6, atol=1e-7, msg=name)


def originals(folder):
    return {name: tensor.contiguous() for name, tensor in original_of(folder, class_of(folder)).items()}


@pytest.mark.parametrize("name", JUDGED)
def test_plain_fp8(checkpoint, tmp_path, name):
    folder, file = checkpoint(name), tmp_path / "model_fp8_e4m3fn.safetensors"
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in originals(folder).items()}, file)
    assert_same(read(file, folder), judged(file, folder))


@pytest.mark.parametrize("name", JUDGED)
def test_scaled_fp8(checkpoint, tmp_path, name):
    """diffusers knows no `scale_weight`: it loads the file with the products in its place."""
    folder, file = checkpoint(name), tmp_path / "model_fp8_scaled.safetensors"
    stored, products = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, {}
    for key, value in originals(folder).items():
        stored[key] = products[key] = value
        if key.endswith(".weight") and value.ndim == 2 and value.isfinite().all():
            stored[key], scale = quantise(value)
            stored[f"{key.removesuffix('weight')}scale_weight"] = scale
            products[key] = stored[key].float() * scale
    save_file({f"model.diffusion_model.{key}": value for key, value in stored.items()}, file)
    save_file(products, tmp_path / "products.safetensors")
    assert_same(read(file, folder), judged(tmp_path / "products.safetensors", folder))


@pytest.mark.parametrize("name", JUDGED)
def test_gguf(checkpoint, tmp_path, name):
    """Matrices of whole blocks as Q8_0 or Q4_0, the others as F16 or F32, as ComfyUI-GGUF has them."""
    folder, stored = checkpoint(name), {}
    for key, value in originals(folder).items():
        whole = value.ndim == 2 and value.shape[1] % 32 == 0
        blocks = Kind.Q4_0 if "attn" in key else Kind.Q8_0
        kind = blocks if whole else Kind.F16 if value.ndim == 2 else Kind.F32
        stored[key] = gguf.quants.quantize(value.float().numpy(), kind), kind
    assert {Kind.Q8_0, Kind.F32} <= {kind for _, kind in stored.values()}
    file = write(tmp_path / "model.gguf", stored)
    quantization = GGUFQuantizationConfig(compute_dtype=torch.float32)
    expected = judged(file, folder, quantization_config=quantization)
    assert_same(read(file, folder), expected)
    trimmed = {  # as llama.cpp's tools store it
        key: (value[0] if value.ndim > 1 and value.shape[0] == 1 else value, kind)
        for key, (value, kind) in stored.items()
    }
    assert_same(read(write(tmp_path / "trimmed.gguf", trimmed), folder), expected)
