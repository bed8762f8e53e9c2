"""Records what bitsandbytes, Quanto and compressed-tensors store, and the numbers that they make of it.

The tests read the recorded file, because bitsandbytes alone is 43 MB to install. To record again:

    pip install bitsandbytes==0.50.2 optimum-quanto==0.2.7 compressed-tensors==0.20.0
    python -m tests.export.checkpoints.formats.quantised.record_quantised

Tensors are named CASE/NAME: a linear layer's state as its library saves it, and "expected", its weight as the
library dequantises it. The file's metadata has {CASE: quantization_config}.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RECORDED = Path(__file__).with_name("quantised_by_libraries.safetensors")


def main() -> None:
    torch.manual_seed(19)
    cases = {**_bitsandbytes(), **_quanto(), **_compressed_tensors()}
    tensors, configs = {}, {}
    for case, (config, state, expected) in cases.items():
        configs[case] = config
        state = {**state, "expected": expected}
        tensors.update({f"{case}/{name}": value.detach().clone() for name, value in state.items()})
    save_file(tensors, RECORDED, {"configs": json.dumps(configs)})


def _bitsandbytes():
    import bitsandbytes as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    found = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            rows = 65 if kind == "nf4" and nested else 4  # 260 blocks: two blocks of their largest values
            layer = bnb.nn.Linear4bit(256, rows, quant_type=kind, compress_statistics=nested).to("cpu")
            weight = layer.weight
            assert weight.quant_state.nested is nested
            expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
            found[f"{kind}{'-nested' if nested else ''}"] = config, layer.state_dict(), expected
    # A last block that is not full. The CPU kernel of 0.50.2 assumes that rows are whole blocks, so that the
    # library's other implementation is the judge.
    layer = bnb.nn.Linear4bit(50, 3, quant_type="nf4", compress_statistics=False).to("cpu")
    state = layer.weight.quant_state
    packed = layer.weight.data.reshape(-1)
    expected = _dequantize_4bit_compute(packed, state.absmax, state.code, 64, (3, 50), torch.float32)
    found["nf4-ragged"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}, layer.state_dict(), expected
    stored_wide = bnb.nn.Linear4bit(
        64, 8, quant_type="nf4", compress_statistics=False, quant_storage=torch.bfloat16
    ).to("cpu")
    weight = stored_wide.weight
    expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    found["nf4-in-bf16"] = {"quant_method": "bitsandbytes"}, stored_wide.state_dict(), expected
    layer = bnb.nn.Linear8bitLt(40, 24, has_fp16_weights=False).to("cpu")
    expected = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    found["int8"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}, layer.state_dict(), expected
    return found


def _quanto():
    from optimum.quanto import QLinear, qfloat8, qint8

    found = {}
    for kind, qtype in (("int8", qint8), ("float8", qfloat8)):
        layer = QLinear.from_module(torch.nn.Linear(40, 24), weights=qtype)
        layer.freeze()
        config = {"quant_method": "quanto", "weights_dtype": kind}
        found[f"quanto-{kind}"] = config, layer.state_dict(), layer.weight.dequantize()
    return found


def _compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    kinds = {
        "fp8-tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, ()),
        "fp8-channel": ({"num_bits": 8, "type": "float", "strategy": "channel"}, (24, 1)),
        "fp8-block": (
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]},
            (3, 2),
        ),
        "int8-channel": ({"num_bits": 8, "type": "int", "strategy": "channel"}, (24, 1)),
        "int8-group": ({"num_bits": 8, "type": "int", "strategy": "group", "group_size": 8}, (24, 4)),
    }
    found = {}
    for kind, (options, shape) in kinds.items():
        args = QuantizationArgs(**options)
        weight = torch.randn(24, 32)
        blocks = weight.reshape(shape[0], 24 // shape[0], shape[1], 32 // shape[1]) if shape else None
        largest = blocks.abs().amax((1, 3)) if shape else weight.abs().max()
        scale = largest / (448.0 if options["type"] == "float" else 127.0)
        stored = torch.float8_e4m3fn if options["type"] == "float" else torch.int8
        values = quantize(weight, scale, torch.zeros_like(scale), args, stored)
        expected = dequantize(values, scale, None, args, torch.float32)
        assert (expected - weight).abs().max() < 0.2
        config = {
            "quant_method": "compressed-tensors",
            "format": f"{options['type']}-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
        }
        found[kind] = config, {"weight": values, "weight_scale": scale}, expected
    return found


if __name__ == "__main__":
    main()
