"""What --lora refuses, and the line that it says; every case is a file of a FLUX or for another model."""

from __future__ import annotations

import json

import pytest
import torch

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.errors import InputError
from tests.export.checkpoints.formats.lora.lora_files import FLUX, KOHYA, PEFT, factors, saved

BLOCK = "transformer.transformer_blocks.0."
GOOD = factors({"transformer_blocks.0.attn.to_q": (48, 48)}, "transformer.", PEFT)


def kohya(modules, **options):
    return factors(modules, "lora_unet_", KOHYA, alpha=2, joint="_", **options)


def beside(key, *shape):
    return GOOD | {key: torch.ones(shape)}


REFUSED = {
    "a UNet's": (
        kohya({"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320)}),
        r"lora_unet_down_blocks_1_\S+lora_up.weight of --lora .* does not fit.*UNet",
    ),
    "Wan's": (
        factors({"blocks.0.self_attn.q": (48, 48)}, "diffusion_model.", PEFT),
        r"diffusion_model.blocks.0.self_attn.q.lora_B.weight of --lora .* does not fit",
    ),
    "a wider FLUX's": (
        factors({"transformer_blocks.0.attn.to_q": (64, 64)}, "transformer.", PEFT),
        r"to_q.lora_B.weight of --lora .* is \[64, 64\] for \S+, which this model has as \[48, 48\]",
    ),
    "a deeper FLUX's": (
        GOOD | factors({"transformer_blocks.9.attn.to_q": (48, 48)}, "transformer.", PEFT),
        r"transformer_blocks.9.attn.to_q.lora_B.weight of --lora .* does not fit",
    ),
    "a deeper FLUX's by Kohya": (
        kohya({"double_blocks.9.img_attn.proj": (48, 48), **FLUX}),
        r"lora_unet_double_blocks_9_img_attn_proj.lora_up.weight of --lora .* does not fit",
    ),
    "control, wider": (
        factors({"x_embedder": (48, 32)}, "transformer.", PEFT),
        r"control LoRA: it widens x_embedder.weight from \[48, 16\] to \[48, 32\]",
    ),
    "control, norms": (beside(f"{BLOCK}attn.norm_q.weight", 16), "norm_q.weight of .* a whole tensor beside"),
    "a whole model": ({"context_embedder.weight": torch.ones(2, 2)}, "no part of a LoRA.*--model"),
    "LoHa": ({f"{BLOCK}attn.to_q.hada_w1_a": torch.ones(2, 2)}, "is a LoHa .*hada_w1_a"),
    "LoKr": ({f"{BLOCK}attn.to_q.lokr_w1": torch.ones(2, 2)}, "is a LoKr .*lokr_w1"),
    "OFT": ({"oft_unet_double_blocks_1_img_mod_lin.oft_blocks": torch.ones(2, 2)}, "is an OFT"),
    "DoRA by LyCORIS": (beside(f"{BLOCK}attn.to_q.dora_scale", 48, 1), "DoRA in LyCORIS' layout"),
    "Tucker": (kohya({"x": (4, 4)}) | {"lora_unet_x.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "Tucker"),
    "one factor": ({f"{BLOCK}attn.to_q.lora_A.weight": torch.ones(4, 48)}, "without its other factor"),
    "ranks differ": (
        {f"{BLOCK}x.lora_A.weight": torch.ones(4, 8), f"{BLOCK}x.lora_B.weight": torch.ones(8, 3)},
        "do not multiply",
    ),
    "two adapters": (beside(f"{BLOCK}attn.to_q.lora_A.other.weight", 4, 48), "holds two adapters"),
    "an alpha that is no number": (
        kohya(FLUX) | {"lora_unet_double_blocks_0_img_mlp_0.alpha": torch.tensor(torch.nan)},
        "img_mlp_0.alpha of .* is nan",
    ),
    "a bias that the model lacks": (
        factors({"transformer_blocks.0.attn.norm_q": (16, 1)}, "transformer.", PEFT)
        | {f"{BLOCK}attn.norm_q.lora_B.bias": torch.ones(16)},
        "norm_q.lora_B.* does not fit",
    ),
    "a norm's difference": (
        kohya(FLUX) | {"lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": torch.ones(16)},
        "query_norm.diff of .* does not fit",
    ),
    "an encoder that is not there": (
        factors({"encoder.block.0.layer.0.SelfAttention.q": (32, 32)}, "text_encoder_3.", PEFT),
        "text_encoder_3.encoder.* changes text_encoder_3, which this model does not have",
    ),
    "another encoder's": (
        factors({"model.layers.0.self_attn.q_proj": (32, 32)}, "text_encoder.", PEFT),
        "q_proj.lora_B.weight of .* does not fit: this text_encoder",
    ),
    "the same change twice": (
        GOOD | factors({"double_blocks.0.img_attn.qkv": (144, 48)}, "diffusion_model.", PEFT),
        "changes transformer_blocks.0.attn.to_q twice",
    ),
    "nothing": ({}, "holds no tensors"),
}


def planned(folder, file, **options):
    given = ExportOptions(model=str(folder), lora=(str(file),), size=(64, 64), **options)
    return make_plan(given, Checkpoint(folder, "it"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_before_work_starts(checkpoint, case, tmp_path):
    tensors, message = REFUSED[case]
    file = saved(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(InputError, match=message) as caught:
        planned(checkpoint("flux"), file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "PEFT's type 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_alpha": "eight"}, "alphas of .* no numbers"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "alpha_pattern of .* has the expression"),
    ],
)
@pytest.mark.parametrize("place", ["metadata", "adapter_config.json"])
def test_settings_that_are_not_understood_are_refused(checkpoint, settings, message, place, tmp_path):
    metadata = {f"transformer.{key}": value for key, value in settings.items()}
    beside_file = place == "adapter_config.json"
    file = saved(
        tmp_path / "adapter_model.safetensors",
        GOOD,
        None if beside_file else {"lora_adapter_metadata": json.dumps(metadata)},
    )
    if beside_file:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        planned(checkpoint("flux"), file)


def test_metadata_that_is_no_json_is_refused(checkpoint, tmp_path):
    file = saved(tmp_path / "lora.safetensors", GOOD, {"lora_adapter_metadata": "{"})
    with pytest.raises(InputError, match="is not JSON"):
        planned(checkpoint("flux"), file)


def test_a_part_of_zeros_without_a_place_does_no_harm(checkpoint, tmp_path):
    """Some trainers write zeros for what they did not train."""
    tensors = kohya(FLUX) | {"lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": torch.zeros(16)}
    plan = planned(checkpoint("flux"), saved(tmp_path / "lora.safetensors", tensors))
    assert len(plan.checkpoint.changed_by_loras("transformer")[0]) == 34


def test_nan_is_named_with_the_file(checkpoint, tmp_path):
    tensors = {name: tensor * torch.nan for name, tensor in GOOD.items()}
    file = saved(tmp_path / "lora.safetensors", tensors)
    weights = planned(checkpoint("flux"), file).checkpoint.weights("transformer")
    with pytest.raises(InputError, match=r"to_q.lora_B.weight of .*lora.safetensors holds NaN"):
        weights.tensor("transformer_blocks.0.attn.to_q.weight")


def test_the_part_of_an_encoder_that_does_not_run_is_not_looked_at(checkpoint, tmp_path):
    embeds = tmp_path / "embeds.safetensors"
    tensors = factors({"model.layers.0.self_attn.q_proj": (32, 32)}, "text_encoder.", PEFT) | GOOD
    file = saved(tmp_path / "lora.safetensors", tensors)
    shapes = {"prompt_embeds": (1, 8, 32), "pooled_prompt_embeds": (1, 16)}
    saved(embeds, {name: torch.ones(shape) for name, shape in shapes.items()})
    planned(checkpoint("flux"), file, prompt_embeds=(embeds,))
