"""Files of quantised weights: as libraries have written them, and made here."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ditf.export.checkpoints.formats.quantised.dequantised import dequantised
from ditf.export.checkpoints.formats.stored_weights import open_weights
from tests.export.checkpoints.formats.quantised.record_quantised import RECORDED

LAYER = "blocks.0.to_q."
FP8 = torch.float8_e4m3fn


def recorded():
    """{case: (quantization_config, {name: stored tensor}, the weight as the library dequantises it)}."""
    with safe_open(RECORDED, "pt") as file:
        configs = json.loads(file.metadata()["configs"])
    cases = {case: (config, {}) for case, config in configs.items()}
    for name, tensor in load_file(RECORDED).items():
        case, _, part = name.partition("/")
        cases[case][1][part] = tensor
    return {case: (config, state, state.pop("expected")) for case, (config, state) in cases.items()}


CASES = recorded()


def opened(tmp_path, tensors, config=None, metadata=None):
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return dequantised(open_weights([path]), config)


def quantise(weight, largest=448.0, dtype=FP8, dim=None):
    """The values and the scale that dequantise to about `weight`; one scale, or one for each row."""
    peak = weight.abs().amax(dim, keepdim=True) if dim is not None else weight.abs().max()
    scale = peak / largest
    values = weight / scale
    return (values if dtype.is_floating_point else values.round()).to(dtype), scale


def note(**content):
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def quantised_copy(source, folder, component, kind):
    """A copy of a checkpoint with the matrices of one component quantised; gives their names."""
    shutil.copytree(source, folder)
    path = next((folder / component).glob("*.safetensors"))
    tensors = load_file(path)
    names = [
        name
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2 and not name.startswith("shared")
    ]
    for name in names:
        module, weight = name.removesuffix("weight"), tensors[name].float()
        if kind == "int8":
            values, scale = quantise(weight, 1.0, torch.float32, dim=1)
            tensors[name] = (values * 127).round().to(torch.int8)
            tensors[f"{module}SCB"] = scale[:, 0].contiguous()
        else:
            tensors[name], scale = quantise(weight)
            tensors[f"{module}{'scale_weight' if kind == 'comfy' else 'weight_scale_inv'}"] = scale
    if kind == "comfy":
        tensors["scaled_fp8"] = torch.zeros(0).to(FP8)
    save_file(tensors, path, {"format": "pt"})
    config = {"int8": {"quant_method": "bitsandbytes", "load_in_8bit": True}, "inv": {"quant_method": "fp8"}}
    if kind in config:
        described = folder / component / "config.json"
        described.write_text(
            json.dumps(json.loads(described.read_text()) | {"quantization_config": config[kind]})
        )
    return names
