"""The tiny checkpoints' transformers in their original layouts, as their authors and ComfyUI name them.

The names were written down from the published files, and are those that diffusers' key maps read. Fused
projections are joined and halves swapped by hand, so nothing of ditf is used here.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

_FLUX_EMBEDDERS = [
    (r"^time_text_embed\.timestep_embedder", "time_in"),
    (r"^time_text_embed\.text_embedder", "vector_in"),
    (r"^time_text_embed\.guidance_embedder", "guidance_in"),
    (r"^(time_in|vector_in|guidance_in)\.linear_1", r"\1.in_layer"),
    (r"^(time_in|vector_in|guidance_in)\.linear_2", r"\1.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
]
_FLUX_BLOCKS = [
    (r"\.norm1\.linear", ".img_mod.lin"),
    (r"\.norm1_context\.linear", ".txt_mod.lin"),
    (r"\.norm\.linear", ".modulation.lin"),
    (r"^(transformer_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.img_attn.norm.query_norm.scale"),
    (r"^(transformer_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"^(single_.*)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_.*)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0", ".img_attn.proj"),
    (r"\.attn\.to_add_out", ".txt_attn.proj"),
    (r"\.ff\.net\.0\.proj", ".img_mlp.0"),
    (r"\.ff\.net\.2", ".img_mlp.2"),
    (r"\.ff_context\.net\.0\.proj", ".txt_mlp.0"),
    (r"\.ff_context\.net\.2", ".txt_mlp.2"),
    (r"^(single_.*)\.proj_out", r"\1.linear2"),
    (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
]
_FLUX_FUSED = [
    ("transformer_blocks", ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv"),
    ("transformer_blocks", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv"),
    ("single_", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1"),
]

_RENAMED: dict[str, list[tuple[str, str]]] = {
    "FluxTransformer2DModel": [*_FLUX_EMBEDDERS, *_FLUX_BLOCKS],
    "ChromaTransformer2DModel": [
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_1", r"\1.in_layer"),
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_2", r"\1.out_layer"),
        (r"^(distilled_guidance_layer\.norms\.\d+)\.weight", r"\1.scale"),
        *_FLUX_EMBEDDERS,
        *_FLUX_BLOCKS,
    ],
    "Flux2Transformer2DModel": [
        (r"^time_guidance_embed\.", "time_text_embed."),
        (r"_modulation(_img|_txt|)\.linear", r"_modulation\1.lin"),
        *_FLUX_EMBEDDERS,
        (r"\.ff\.linear_in", ".img_mlp.0"),
        (r"\.ff\.linear_out", ".img_mlp.2"),
        (r"\.ff_context\.linear_in", ".txt_mlp.0"),
        (r"\.ff_context\.linear_out", ".txt_mlp.2"),
        (r"\.attn\.to_qkv_mlp_proj", ".linear1"),
        (r"^(single_.*)\.attn\.to_out\.", r"\1.linear2."),
        *_FLUX_BLOCKS,
    ],
    "SD3Transformer2DModel": [
        (r"^pos_embed\.pos_embed", "pos_embed"),
        (r"^pos_embed\.proj", "x_embedder.proj"),
        (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
        (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
        (r"^proj_out", "final_layer.linear"),
        (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"\.attn\.norm_(q|k)\.", r".x_block.attn.ln_\1."),
        (r"\.attn2\.norm_(q|k)\.", r".x_block.attn2.ln_\1."),
        (r"\.attn\.norm_added_(q|k)\.", r".context_block.attn.ln_\1."),
        (r"\.(attn2?)\.to_out\.0", r".x_block.\1.proj"),
        (r"\.attn\.to_add_out", ".context_block.attn.proj"),
        (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
        (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
        (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
        (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
        (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
        (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
        (r"^transformer_blocks", "joint_blocks"),
    ],
    "AuraFlowTransformer2DModel": [
        (r"^pos_embed\.pos_embed", "positional_encoding"),
        (r"^pos_embed\.proj", "init_x_linear"),
        (r"^time_step_proj\.linear_1", "t_embedder.mlp.0"),
        (r"^time_step_proj\.linear_2", "t_embedder.mlp.2"),
        (r"^context_embedder", "cond_seq_linear"),
        (r"^proj_out", "final_linear"),
        (r"^norm_out\.linear", "modF.1"),
        (r"^(joint_.*)\.ff\.", r"\1.mlpX."),
        (r"^(joint_.*)\.ff_context\.", r"\1.mlpC."),
        (r"^(single_.*)\.ff\.", r"\1.mlp."),
        (r"\.linear_(1|2)\.", r".c_fc\1."),
        (r"\.out_projection\.", ".c_proj."),
        (r"^(single_.*)\.norm1\.linear", r"\1.modCX.1"),
        (r"\.norm1\.linear", ".modX.1"),
        (r"\.norm1_context\.linear", ".modC.1"),
        (r"^(joint_.*)\.attn\.to_(q|k|v)\.", r"\1.attn.w2\2."),
        (r"^(joint_.*)\.attn\.to_out\.0\.", r"\1.attn.w2o."),
        (r"\.attn\.add_(q|k|v)_proj\.", r".attn.w1\1."),
        (r"\.attn\.to_add_out\.", ".attn.w1o."),
        (r"\.attn\.to_(q|k|v)\.", r".attn.w1\1."),
        (r"\.attn\.to_out\.0\.", ".attn.w1o."),
        (r"^joint_transformer_blocks", "double_layers"),
        (r"^single_transformer_blocks", "single_layers"),
    ],
    "Lumina2Transformer2DModel": [
        (r"^time_caption_embed\.caption_embedder", "cap_embedder"),
        (r"^time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"^time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"^norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
        (r"^norm_out\.linear_2", "final_layer.linear"),
        (r"\.norm1\.linear", ".adaLN_modulation.1"),
        (r"^(context_refiner\.\d+)\.norm1\.", r"\1.attention_norm1."),
        (r"\.norm1\.norm", ".attention_norm1"),
        (r"\.norm2\.", ".attention_norm2."),
        (r"\.attn\.norm_(q|k)\.", r".attention.\1_norm."),
        (r"\.attn\.to_out\.0\.", ".attention.out."),
        (r"\.attn\.qkv\.", ".attention.qkv."),
        (r"\.feed_forward\.linear_(\d)\.", r".feed_forward.w\1."),
    ],
    "ZImageTransformer2DModel": [
        (r"^all_final_layer\.2-1\.", "final_layer."),
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"\.attention\.norm_(q|k)\.", r".attention.\1_norm."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
    ],
    "PixArtTransformer2DModel": [
        (r"^pos_embed\.proj", "x_embedder.proj"),
        (r"^caption_projection\.linear_(\d)", r"y_embedder.y_proj.fc\1"),
        (r"^adaln_single\.emb\.timestep_embedder", "t_embedder"),
        (r"^adaln_single\.emb\.resolution_embedder", "csize_embedder"),
        (r"^adaln_single\.emb\.aspect_ratio_embedder", "ar_embedder"),
        (r"^(t|csize|ar)_embedder\.linear_1", r"\1_embedder.mlp.0"),
        (r"^(t|csize|ar)_embedder\.linear_2", r"\1_embedder.mlp.2"),
        (r"^adaln_single\.linear", "t_block.1"),
        (r"^proj_out", "final_layer.linear"),
        (r"^scale_shift_table", "final_layer.scale_shift_table"),
        (r"\.attn1\.to_out\.0", ".attn.proj"),
        (r"\.attn2\.to_q", ".cross_attn.q_linear"),
        (r"\.attn2\.to_out\.0", ".cross_attn.proj"),
        (r"\.ff\.net\.0\.proj", ".mlp.fc1"),
        (r"\.ff\.net\.2", ".mlp.fc2"),
        (r"^transformer_blocks", "blocks"),
    ],
}
"""By class: (diffusers' name, original name), applied one after another."""

_FUSED: dict[str, list[tuple[str, tuple[str, ...], str]]] = {
    "FluxTransformer2DModel": _FLUX_FUSED,
    "ChromaTransformer2DModel": _FLUX_FUSED,
    "Flux2Transformer2DModel": _FLUX_FUSED[:2],
    "SD3Transformer2DModel": [
        ("", ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.qkv"),
        ("", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "context_block.attn.qkv"),
        ("", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.qkv"),
    ],
    "Lumina2Transformer2DModel": [("", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.qkv")],
    "ZImageTransformer2DModel": [
        ("", ("attention.to_q", "attention.to_k", "attention.to_v"), "attention.qkv")
    ],
    "PixArtTransformer2DModel": [
        ("", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.qkv"),
        ("", ("attn2.to_k", "attn2.to_v"), "cross_attn.kv_linear"),
    ],
}
"""By class: (start of the name, modules in order, the module that they are one of)."""

_SWAPPED = {
    "FluxTransformer2DModel": r"norm_out\.",
    "Flux2Transformer2DModel": r"norm_out\.",
    "AuraFlowTransformer2DModel": r"norm_out\.",
    "SD3Transformer2DModel": r"norm_out\.|transformer_blocks\.{last}\.norm1_context\.",
}
"""Modules whose scale and shift are the other way round, by class."""

UNREAD = {
    "PixArtTransformer2DModel": {"pos_embed": (1, 64, 48), "y_embedder.y_embedding": (120, 32)},
    "Lumina2Transformer2DModel": {"norm_final.weight": (48,)},
    "ZImageTransformer2DModel": {"norm_final.weight": (48,)},
}
"""Tensors of published files that diffusers does not read, by class. Some files of Z-Image hold NaN there."""

WIDTHS = {
    "FluxTransformer2DModel": {3072: 48},
    "ChromaTransformer2DModel": {3072: 48},
    "Lumina2Transformer2DModel": {2304: 48, 768: 24},
}
"""Widths of published models that stand in diffusers' key maps, and those of the tiny checkpoints."""


def original(class_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer's tensors under their original names, fused and swapped as in published files."""
    blocks = [int(name.split(".")[1]) for name in tensors if re.match(r"transformer_blocks\.\d", name)]
    swapped = _SWAPPED.get(class_name, "$^").replace("{last}", str(max(blocks, default=0)))
    made = {}
    for name, tensor in tensors.items():
        if re.match(swapped, name):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        for start, parts, fused in _FUSED.get(class_name, []):
            if name.startswith(start) and any(f".{part}." in name for part in parts):
                if f".{parts[0]}." not in name:
                    break
                tensor = torch.cat([tensors[name.replace(parts[0], part)] for part in parts])
                name = name.replace(parts[0], fused)
        else:
            for old, new in _RENAMED[class_name]:
                name = re.sub(old, new, name)
            made[name] = tensor
    return made


def original_of(folder: Path, class_name: str) -> dict[str, torch.Tensor]:
    """The transformer of a tiny checkpoint in its original layout."""
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    unread = UNREAD.get(class_name, {})
    return {
        **original(class_name, tensors),
        **{name: torch.full(shape, torch.nan) for name, shape in unread.items()},
    }


def narrowed(key_map: Callable, widths: Mapping[int, int]) -> Callable:
    """A key map of diffusers with other widths in place of the published ones, which stand in its code."""

    def changed(code: types.CodeType) -> types.CodeType:
        constants = (
            changed(one)
            if isinstance(one, types.CodeType)
            else widths.get(one, one)
            if type(one) is int
            else one
            for one in code.co_consts
        )
        return code.replace(co_consts=tuple(constants))

    return types.FunctionType(
        changed(key_map.__code__),
        key_map.__globals__,
        key_map.__name__,
        key_map.__defaults__,
        key_map.__closure__,
    )
