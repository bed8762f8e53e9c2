"""What cannot be dequantised is refused by the name of who wrote it, before any work starts."""

from __future__ import annotations

import pytest
import torch

from ditf.runtime.errors import InputError
from tests.export.checkpoints.formats.quantised.quantised_files import CASES, FP8, LAYER, note, opened

BYTES = torch.zeros(4, 8, dtype=torch.uint8)
WORDS = torch.zeros(4, 8, dtype=torch.int32)
VALUES = torch.ones(4, 8).to(FP8)
ONE = torch.tensor(0.5)
REFUSED = {
    "int8": ({"q.weight": BYTES.to(torch.int8)}, None, "stored as I8 without its scales; take the bf16"),
    "bool": ({"q.weight": BYTES.to(torch.bool)}, None, "stored as BOOL without its scales"),
    "named int8": (
        {"q.weight": BYTES.to(torch.int8)},
        {"quant_method": "bitsandbytes"},
        r"stored as I8 without its scales \(its config says 'bitsandbytes'\)",
    ),
    "a lost scale": (
        {"a.weight": VALUES, "a.weight_scale": ONE, "b.weight": VALUES},
        None,
        r"tensor b\.weight .* is stored as F8_E4M3 without its scales",
    ),
    "no scale at all": ({"a.weight": VALUES}, {"quant_method": "fp8"}, "F8_E4M3 without its scales"),
    "a scale of bfloat16": (
        {"a.weight": VALUES.bfloat16(), "a.weight_scale": ONE},
        None,
        r"tensor a\.weight .* is BF16 and has the scale a\.weight_scale",
    ),
    "two scales": (
        {"a.weight": VALUES, "a.weight_scale": ONE, "a.scale_weight": ONE},
        None,
        "cannot be dequantised: it has 2 scales",
    ),
    "a scale of columns": (
        {"a.weight": VALUES, "a.weight_scale": torch.ones(1, 8)},
        None,
        r"its shape is \[4, 8\], that of a\.weight_scale \[1, 8\]",
    ),
    "bytes as scales": (
        {"a.weight": VALUES, "a.weight_scale_inv": BYTES[:, :1]},
        {"quant_method": "mxfp8"},
        "quantised by 'mxfp8', which is not supported",
    ),
    "exponents": (
        {"a.weight": VALUES, "a.weight_scale_inv": torch.ones(4, 1).to(torch.float8_e8m0fnu)},
        None,
        r"tensor a\.weight_scale_inv .* is F8_E8M0",
    ),
    "an unknown companion": (
        {"a.weight": VALUES, "a.qscale_weight": ONE},
        None,
        r"tensor a\.qscale_weight .* belongs to a weight that is quantised in an unknown way",
    ),
    "a scale without a known weight": (
        {"experts.gate_proj": VALUES, "experts.gate_proj_scale_inv": ONE},
        None,
        r"tensor experts\.gate_proj_scale_inv .* quantised in an unknown way",
    ),
    "a zero point": (
        {"a.weight": VALUES, "a.weight_scale": ONE, "a.weight_zero_point": ONE},
        {"quant_method": "compressed-tensors"},
        r"tensor a\.weight_zero_point .* quantised in an unknown way \(its config says 'compressed-tensors'",
    ),
    "rotated": (
        {"a.weight": VALUES, "a.weight_scale": ONE},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"r": {}}}},
        "quantization_config has transform_config",
    ),
    "nvfp4": ({"a.weight": BYTES, "a.weight_scale": VALUES, "a.weight_scale_2": ONE}, None, "is of NVFP4"),
    "mxfp4": ({"a.down_proj_blocks": BYTES, "a.down_proj_scales": BYTES}, None, "is of MXFP4"),
    "nunchaku": (
        {"a.qweight": BYTES, "a.wscales": ONE, "a.proj_down": ONE},
        None,
        r"is of SVDQuant \(nunchaku\)",
    ),
    "gptq": (
        {"a.qweight": WORDS, "a.qzeros": WORDS, "a.scales": ONE, "a.g_idx": WORDS},
        None,
        "is of GPTQ or AWQ",
    ),
    "packed": (
        {"a.weight_packed": WORDS, "a.weight_scale": ONE},
        None,
        "is of compressed-tensors in packed form",
    ),
    "hqq": ({"a.W_q": BYTES, "a.scale": ONE, "a.zero": ONE}, None, "is of HQQ"),
    "torchao": (
        {"a._weight_qdata": VALUES, "a._weight_scale": ONE},
        {"quant_method": "torchao"},
        r"is of torchao, which is not supported; save the model after model\.dequantize\(\)",
    ),
    "quanto qint4": (
        {"a.weight._data._data": BYTES, "a.weight._scale": ONE, "a.weight._shift": ONE},
        None,
        "is of Quanto with 4 or 2 bits",
    ),
    "sdnq": ({"a.weight": BYTES, "a.scale": ONE, "a.svd_up": ONE}, {"quant_method": "sdnq"}, "is of SDNQ"),
    "modelopt": ({"a.weight": VALUES, "a.weight_quantizer._scale": ONE}, None, "is of ModelOpt"),
    "another method": (
        {"a.weight": VALUES, "a.weight_scale": ONE},
        {"quant_method": "quark"},
        "quantised by 'quark', which is not supported",
    ),
    "comfyui nvfp4": (
        {"a.weight": BYTES, "a.comfy_quant": note(format="nvfp4")},
        None,
        "ComfyUI's format 'nvfp4'",
    ),
    "comfyui convrot": (
        {
            "a.weight": BYTES.to(torch.int8),
            "a.weight_scale": ONE,
            "a.comfy_quant": note(format="int8_tensorwise", convrot=True),
        },
        None,
        "ComfyUI's format 'int8_tensorwise with convrot'",
    ),
    "comfyui's broken note": (
        {"a.weight": VALUES, "a.comfy_quant": BYTES[0]},
        None,
        "ComfyUI's note of its format cannot be read",
    ),
    "a note without a scale": (
        {"a.weight": VALUES, "a.comfy_quant": note(format="float8_e4m3fn")},
        None,
        r"tensor a\.weight .* cannot be dequantised: a\.weight_scale is missing",
    ),
    "a mark without scales": (
        {"a.weight": VALUES.bfloat16(), "scaled_fp8": VALUES[0, :2]},
        None,
        "tensor scaled_fp8 .* says that FP8 weights have scales, and none has one",
    ),
    "quanto without a scale": (
        {"a.weight._data": BYTES.to(torch.int8)},
        None,
        r"a\.weight\._scale is missing",
    ),
    "SCB without a weight": ({"a.SCB": torch.ones(4)}, None, r"tensor a\.SCB .* a\.weight is None"),
    "SCB of another size": (
        {"a.weight": BYTES.to(torch.int8), "a.SCB": torch.ones(8)},
        None,
        r"a\.weight is I8 \[4, 8\]",
    ),
    "int8 in the order of a GPU": (
        {"a.weight": BYTES.to(torch.int8), "a.SCB": torch.ones(4), "a.weight_format": BYTES[0, 0] + 1},
        None,
        r"a GPU's own order of elements; save the model after model\.dequantize",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_name(tmp_path, case):
    tensors, config, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        opened(tmp_path, {name: tensor.clone() for name, tensor in tensors.items()}, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part", ["weight.absmax", "weight.nested_absmax", "weight.nested_quant_map", "weight"]
)
@pytest.mark.parametrize("change", ["missing", "short"])
def test_damaged_four_bits(tmp_path, part, change):
    config, state, _ = CASES["nf4-nested"]
    state = dict(state)
    state[part] = state[part][:-1]
    if change == "missing":
        del state[part]
    with pytest.raises(InputError, match=r"(cannot be dequantised|quantised in an unknown way)"):
        opened(tmp_path, {LAYER + name: tensor for name, tensor in state.items()}, config)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"shape": [4, 256], "blocksize": 63}',
        b'{"shape": [4, 256], "blocksize": Infinity}',
        b'{"shape": [4, -1], "blocksize": 64}',
        b'{"shape": 3, "blocksize": 64}',
        b"[" * 9999,
    ],
)
def test_damaged_states_of_four_bits(tmp_path, content):
    config, state, _ = CASES["nf4"]
    state = {**state, "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(content), dtype=torch.uint8)}
    with pytest.raises(InputError, match="cannot be dequantised: it cannot be read"):
        opened(tmp_path, state, config)
