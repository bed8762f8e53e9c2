"""LoRA files in the key layouts of several trainers, for the tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH = 48
KOHYA = ("lora_down", "lora_up")
PEFT = ("lora_A", "lora_B")
XLABS = ("down", "up")
DOTS = ("lora.down", "lora.up")

FLUX = {
    f"double_blocks.{block}.{stream}_{module}": shape
    for block in range(2)
    for stream in ("img", "txt")
    for module, shape in {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.0": (4 * WIDTH, WIDTH),
        "mlp.2": (WIDTH, 4 * WIDTH),
        "mod.lin": (6 * WIDTH, WIDTH),
    }.items()
} | {
    f"single_blocks.{block}.{module}": shape
    for block in range(3)
    for module, shape in {"linear2": (WIDTH, 5 * WIDTH), "modulation.lin": (3 * WIDTH, WIDTH)}.items()
}
"""Shapes of the original FLUX's modules, all but linear1, whose width diffusers' loader fixes at 3072."""

CHROMA = {name: shape for name, shape in FLUX.items() if "mod" not in name}

FLUX_XLABS = {
    f"double_blocks.{block}.processor.{module}": shape
    for block in range(2)
    for module, shape in {
        "qkv_lora1": (3 * WIDTH, WIDTH),
        "qkv_lora2": (3 * WIDTH, WIDTH),
        "proj_lora1": (WIDTH, WIDTH),
        "proj_lora2": (WIDTH, WIDTH),
    }.items()
} | {
    f"single_blocks.{block}.processor.{module}": shape
    for block in range(3)
    for module, shape in {"qkv_lora": (3 * WIDTH, WIDTH), "proj_lora": (WIDTH, 5 * WIDTH)}.items()
}

FLUX2 = {
    f"double_blocks.{block}.{stream}_{module}": shape
    for block in range(2)
    for stream in ("img", "txt")
    for module, shape in {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.0": (6 * WIDTH, WIDTH),
        "mlp.2": (WIDTH, 3 * WIDTH),
    }.items()
} | {
    f"single_blocks.{block}.{module}": shape
    for block in range(3)
    for module, shape in {"linear1": (9 * WIDTH, WIDTH), "linear2": (WIDTH, 4 * WIDTH)}.items()
}

ZIMAGE = {
    f"layers.{block}.{module}": shape
    for block in range(3)
    for module, shape in {
        "attention.qkv": (3 * WIDTH, WIDTH),
        "attention.out": (WIDTH, WIDTH),
        "feed_forward.w1": (128, WIDTH),
        "adaLN_modulation.0": (4 * WIDTH, WIDTH),
    }.items()
}


def factors(modules, prefix, style, alpha=None, joint=".", rank=4):
    """Random factors of modules, with the keys of one trainer."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for module, (rows, columns) in modules.items():
        name = prefix + module.replace(".", joint)
        tensors[f"{name}.{style[0]}.weight"] = torch.randn(rank, columns, generator=generator) / 10
        tensors[f"{name}.{style[1]}.weight"] = torch.randn(rows, rank, generator=generator) / 10
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def saved(path: Path, tensors, metadata=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path
