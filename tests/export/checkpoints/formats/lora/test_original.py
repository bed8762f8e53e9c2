"""LoRAs with the names of original models, against diffusers' converters of whole checkpoints.

A LoRA is added to a random checkpoint in the original layout, and diffusers converts the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers.loaders import single_file_utils

from ditf.export.checkpoints.formats.lora.given import Lora
from ditf.export.checkpoints.formats.lora.weights import LoraWeights
from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from tests.export.checkpoints.formats.lora.lora_files import KOHYA, PEFT, factors, saved


def named(prefix, modules):
    return {f"{prefix}{name}": shape for name, shape in modules.items()}


def sd3():
    """Two blocks, the first with a second attention; the last reads its text for the last time."""
    block = {"attn.qkv": (36, 12), "attn.proj": (12, 12), "mlp.fc1": (48, 12), "mlp.fc2": (12, 48)}
    modules = {
        "t_embedder.mlp.0": (12, 5),
        "y_embedder.mlp.2": (12, 12),
        "x_embedder.proj": (12, 16),
        "context_embedder": (12, 7),
        "final_layer.linear": (16, 12),
        "final_layer.adaLN_modulation.1": (24, 12),
    }
    for number in range(2):
        modules |= named(f"joint_blocks.{number}.x_block.", block | {"adaLN_modulation.1": (72, 12)})
    modules |= named("joint_blocks.0.x_block.", {"attn2.qkv": (36, 12), "attn2.proj": (12, 12)})
    modules |= named("joint_blocks.0.context_block.", block | {"adaLN_modulation.1": (72, 12)})
    modules |= named("joint_blocks.1.context_block.", {"attn.qkv": (36, 12), "adaLN_modulation.1": (24, 12)})
    rest = {"t_embedder.mlp.2": (12, 12), "y_embedder.mlp.0": (12, 5)}
    return modules, modules | rest, {"pos_embed": (1, 4, 12)}


def auraflow():
    feed_forward = {"c_fc1": (32, 12), "c_fc2": (32, 12), "c_proj": (12, 32)}
    attention = {f"attn.w{stream}{one}": (12, 12) for stream in "12" for one in "qkvo"}
    modules = {
        "t_embedder.mlp.0": (12, 5),
        "t_embedder.mlp.2": (12, 12),
        "cond_seq_linear": (12, 7),
        "init_x_linear": (12, 16),
        "final_linear": (16, 12),
        "modF.1": (24, 12),
        **named("double_layers.0.", attention | {"modX.1": (72, 12), "modC.1": (72, 12)}),
        **named("double_layers.0.mlpX.", feed_forward),
        **named("double_layers.0.mlpC.", feed_forward),
        **named("single_layers.0.", {f"attn.w1{one}": (12, 12) for one in "qkvo"}),
        **named("single_layers.0.", {"modCX.1": (72, 12)}),
        **named("single_layers.0.mlp.", feed_forward),
    }
    return modules, modules, {"register_tokens": (1, 8, 12), "positional_encoding": (1, 4, 12)}


def lumina2():
    """Queries, keys and values have the sizes that diffusers' converter fixes; the width is not theirs."""
    block = {"attention.qkv": (2304 + 2 * 768, 12), "attention.out": (12, 2304)}
    block |= {f"feed_forward.w{one}": (16, 12) for one in "13"} | {"feed_forward.w2": (12, 16)}
    modules = {"t_embedder.mlp.0": (12, 5), "t_embedder.mlp.2": (12, 12), "cap_embedder.1": (12, 7)}
    for blocks in ("layers.0.", "noise_refiner.1.", "noise_refiner.0."):
        modules |= named(blocks, block | {"adaLN_modulation.1": (48, 12)})
    modules |= named("context_refiner.0.", block)
    modules |= {"final_layer.linear": (16, 12), "final_layer.adaLN_modulation.1": (12, 12)}
    return modules, modules, {}


def flux():
    """One single block of FLUX's width, the only one that diffusers' loader of LoRAs reads."""
    modules = {"single_blocks.0.linear1": (7 * 3072, 12), "double_blocks.0.img_attn.qkv": (36, 12)}
    rest = {
        **{f"{name}_in.{layer}_layer": (12, 5) for name in ("time", "vector") for layer in ("in", "out")},
        **{"txt_in": (12, 7), "img_in": (12, 16), "final_layer.linear": (16, 12)},
        **{"final_layer.adaLN_modulation.1": (24, 12), "single_blocks.0.modulation.lin": (36, 12)},
        "single_blocks.0.linear2": (12, 60),
    }
    for stream in ("img", "txt"):
        block = {"attn.qkv": (36, 12), "attn.proj": (12, 12), "mlp.0": (48, 12), "mlp.2": (12, 48)}
        rest |= named(f"double_blocks.0.{stream}_", block | {"mod.lin": (72, 12)})
    norms = [f"double_blocks.0.{stream}_attn.norm" for stream in ("img", "txt")] + ["single_blocks.0.norm"]
    others = {f"{norm}.{one}_norm.scale": (4,) for norm in norms for one in ("query", "key")}
    return modules, rest | modules, others


@dataclass(frozen=True)
class Original:
    """The original layout of a family.

    Attributes:
        model: the diffusers class.
        convert: diffusers' converter of a whole checkpoint.
        layout: gives the shapes of the modules that the LoRA changes, of all, and of other tensors.
        bias: whether modules have a bias.
    """

    model: str
    convert: str
    layout: object
    bias: bool


ORIGINALS = {
    "SD3": Original("SD3Transformer2DModel", "convert_sd3_transformer_checkpoint_to_diffusers", sd3, True),
    "AuraFlow": Original(
        "AuraFlowTransformer2DModel", "convert_auraflow_transformer_checkpoint_to_diffusers", auraflow, False
    ),
    "Lumina2": Original("Lumina2Transformer2DModel", "convert_lumina2_to_diffusers", lumina2, False),
    "FLUX": Original(
        "FluxTransformer2DModel", "convert_flux_transformer_checkpoint_to_diffusers", flux, True
    ),
}


@pytest.mark.parametrize("layout", ["Kohya", "ComfyUI"])
@pytest.mark.parametrize("family", ORIGINALS)
def test_a_lora_with_original_names(family, layout, tmp_path):
    original = ORIGINALS[family]
    changed, modules, others = original.layout()
    generator = torch.Generator().manual_seed(0)
    state = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in modules.items()}
    if original.bias or family == "AuraFlow":
        biased = modules if original.bias else ["init_x_linear"]
        state |= {f"{name}.bias": torch.randn(modules[name][0], generator=generator) for name in biased}
    state |= {name: torch.randn(shape, generator=generator) for name, shape in others.items()}
    if layout == "Kohya":
        tensors = factors(changed, "lora_unet_", KOHYA, alpha=6, joint="_")
    else:
        tensors = factors(changed, "diffusion_model.", PEFT)
    summed = dict(state)
    for name in changed:
        prefix = f"lora_unet_{name.replace('.', '_')}" if layout == "Kohya" else f"diffusion_model.{name}"
        down, up = KOHYA if layout == "Kohya" else PEFT
        product = tensors[f"{prefix}.{up}.weight"] @ tensors[f"{prefix}.{down}.weight"]
        summed[f"{name}.weight"] = state[f"{name}.weight"] + product * (6 / 4 if layout == "Kohya" else 1)
    convert = getattr(single_file_utils, original.convert)
    plain, expected = (
        {name: value for name, value in convert(dict(one)).items() if value is not None}
        for one in (state, summed)
    )
    base = SafetensorsWeights([saved(tmp_path / "model.safetensors", plain)])
    file = saved(tmp_path / "lora.safetensors", tensors)
    weights = LoraWeights(base, [Lora(file)], "transformer", (), original.model)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights.tensor(name), tensor, atol=1e-6, rtol=1e-6)
    moved = {name for name, tensor in expected.items() if not torch.equal(tensor, plain[name])}
    assert weights.changed == [moved]
