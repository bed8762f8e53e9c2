"""Names of modules in the original models, for families whose loader in diffusers does not translate LoRAs.

The sources are diffusers' converters of whole checkpoints (`diffusers.loaders.single_file_utils`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

_QKV = "to_q to_k to_v"
_CONTEXT_QKV = "add_q_proj add_k_proj add_v_proj"

_SD3 = {
    "joint_blocks.#.x_block.": {
        "attn.qkv": f"transformer_blocks.#.attn.: {_QKV}",
        "attn.proj": "transformer_blocks.#.attn.: to_out.0",
        "attn2.qkv": f"transformer_blocks.#.attn2.: {_QKV}",
        "attn2.proj": "transformer_blocks.#.attn2.: to_out.0",
        "mlp.fc1": "transformer_blocks.#.ff.net.: 0.proj",
        "mlp.fc2": "transformer_blocks.#.ff.net.: 2",
        "adaLN_modulation.1": "transformer_blocks.#.: norm1.linear",
    },
    "joint_blocks.#.context_block.": {
        "attn.qkv": f"transformer_blocks.#.attn.: {_CONTEXT_QKV}",
        "attn.proj": "transformer_blocks.#.attn.: to_add_out",
        "mlp.fc1": "transformer_blocks.#.ff_context.net.: 0.proj",
        "mlp.fc2": "transformer_blocks.#.ff_context.net.: 2",
        "adaLN_modulation.1": "transformer_blocks.#.: norm1_context.linear",
    },
    "": {
        "x_embedder.proj": "pos_embed.: proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.: linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.: linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.: linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.: linear_2",
        "final_layer.linear": ": proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.: linear",
    },
}

_PROJECTIONS = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}

_AURAFLOW = {
    "double_layers.#.": {
        **{f"attn.w2{one}": f"joint_transformer_blocks.#.attn.: to_{one}" for one in "qkv"},
        "attn.w2o": "joint_transformer_blocks.#.attn.: to_out.0",
        **{f"attn.w1{one}": f"joint_transformer_blocks.#.attn.: add_{one}_proj" for one in "qkv"},
        "attn.w1o": "joint_transformer_blocks.#.attn.: to_add_out",
        **{f"mlpX.{a}": f"joint_transformer_blocks.#.ff.: {b}" for a, b in _PROJECTIONS.items()},
        **{f"mlpC.{a}": f"joint_transformer_blocks.#.ff_context.: {b}" for a, b in _PROJECTIONS.items()},
        "modX.1": "joint_transformer_blocks.#.: norm1.linear",
        "modC.1": "joint_transformer_blocks.#.: norm1_context.linear",
    },
    "single_layers.#.": {
        **{f"attn.w1{one}": f"single_transformer_blocks.#.attn.: to_{one}" for one in "qkv"},
        "attn.w1o": "single_transformer_blocks.#.attn.: to_out.0",
        **{f"mlp.{a}": f"single_transformer_blocks.#.ff.: {b}" for a, b in _PROJECTIONS.items()},
        "modCX.1": "single_transformer_blocks.#.: norm1.linear",
    },
    "": {
        "t_embedder.mlp.0": "time_step_proj.: linear_1",
        "t_embedder.mlp.2": "time_step_proj.: linear_2",
        "cond_seq_linear": ": context_embedder",
        "init_x_linear": "pos_embed.: proj",
        "final_linear": ": proj_out",
        "modF.1": "norm_out.: linear",
    },
}

_LUMINA2 = {
    **{
        f"{blocks}.#.": {
            "attention.qkv": f"{blocks}.#.attn.: {_QKV}",
            "attention.out": f"{blocks}.#.attn.: to_out.0",
            **{f"feed_forward.w{one}": f"{blocks}.#.feed_forward.: linear_{one}" for one in "123"},
            "adaLN_modulation.1": f"{blocks}.#.: norm1.linear",
        }
        for blocks in ("layers", "noise_refiner", "context_refiner")
    },
    "": {
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.: linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.: linear_2",
        "cap_embedder.1": "time_caption_embed.caption_embedder.: 1",
        "final_layer.linear": "norm_out.: linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.: linear_1",
    },
}

_NAMES: dict[str, dict[str, dict[str, str]]] = {
    "SD3Transformer2DModel": _SD3,
    "AuraFlowTransformer2DModel": _AURAFLOW,
    "Lumina2Transformer2DModel": _LUMINA2,
}
"""{class: {original prefix: {original module: "prefix: modules that its rows are"}}}; # is a number."""

_SWAPPED = {
    "SD3Transformer2DModel": ("norm_out.linear", "norm1_context.linear"),
    "AuraFlowTransformer2DModel": ("norm_out.linear",),
}
"""Modules whose two halves, shift and scale, the original model has in the other order."""


def original_modules(
    model: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[tuple[str, torch.Tensor | None]]]:
    """Where the rows of each module of the original model are in the diffusers model.

    Args:
        model: the class of the transformer.
        shapes: of its tensors.

    Returns:
        {original name: [(module, the original's rows that it holds; None for all)]}; {} for other classes.
    """
    places: dict[str, list[tuple[str, torch.Tensor | None]]] = {}
    for original, modules in _pairs(model):
        for number in range(_blocks(modules[0], shapes)):
            targets = [module.replace("#", str(number)) for module in modules]
            counts = [shapes[f"{target}.weight"][0] for target in targets if f"{target}.weight" in shapes]
            if len(counts) == len(targets):
                name = original.replace("#", str(number))
                places[name] = list(zip(targets, _rows(model, targets, counts, shapes), strict=True))
    return places


def _pairs(model: str) -> Iterator[tuple[str, list[str]]]:
    for start, modules in _NAMES.get(model, {}).items():
        for module, targets in modules.items():
            prefix, _, names = targets.partition(": ")
            yield start + module, [prefix + name for name in names.split()]


def _blocks(module: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of blocks of the kind that a module belongs to; 1 outside blocks."""
    start, sign, _ = module.partition("#")
    if not sign:
        return 1
    return len({name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)})


def _rows(
    model: str, targets: list[str], counts: list[int], shapes: Mapping[str, tuple[int, ...]]
) -> list[torch.Tensor | None]:
    if len(targets) > 1:
        return list(torch.arange(sum(counts)).split(counts))
    # SD3's norm1_context has this order in the last block only, where it has a shift and a scale.
    halves = shapes[f"{targets[0]}.weight"] == (counts[0], counts[0] // 2)
    if halves and targets[0].endswith(_SWAPPED.get(model, ("\0",))):
        return [torch.arange(counts[0]).roll(counts[0] // 2)]
    return [None]
