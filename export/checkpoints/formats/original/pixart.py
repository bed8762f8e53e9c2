"""The key map of PixArt, which diffusers has in scripts only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ditf.export.checkpoints.formats.original.rows import Rows

_PIXART = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"x_embedder\.proj\.", "pos_embed.proj."),
        (r"y_embedder\.y_proj\.fc([12])\.", r"caption_projection.linear_\1."),
        (r"t_embedder\.mlp\.", "adaln_single.emb.timestep_embedder.mlp."),
        (r"csize_embedder\.mlp\.", "adaln_single.emb.resolution_embedder.mlp."),
        (r"ar_embedder\.mlp\.", "adaln_single.emb.aspect_ratio_embedder.mlp."),
        (r"(.*_embedder)\.mlp\.0\.", r"\1.linear_1."),
        (r"(.*_embedder)\.mlp\.2\.", r"\1.linear_2."),
        (r"t_block\.1\.", "adaln_single.linear."),
        (r"final_layer\.linear\.", "proj_out."),
        (r"final_layer\.scale_shift_table", "scale_shift_table"),
        (r"blocks\.(\d+)\.", r"transformer_blocks.\1."),
        (r"(transformer_blocks\.\d+)\.attn\.proj\.", r"\1.attn1.to_out.0."),
        (r"(transformer_blocks\.\d+)\.mlp\.fc1\.", r"\1.ff.net.0.proj."),
        (r"(transformer_blocks\.\d+)\.mlp\.fc2\.", r"\1.ff.net.2."),
        (r"(transformer_blocks\.\d+)\.cross_attn\.q_linear\.", r"\1.attn2.to_q."),
        (r"(transformer_blocks\.\d+)\.cross_attn\.proj\.", r"\1.attn2.to_out.0."),
    )
)
"""Beginnings of PixArt's names, and those of diffusers; a rule may take the result of one above it."""

_PIXART_FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}


def pixart_names(checkpoint: dict[str, Rows], config: Mapping[str, Any]) -> dict[str, Rows | None]:
    """The key map of PixArt-alpha and -Sigma, which diffusers has in a script only.

    Source: scripts/convert_pixart_to_diffusers.py and convert_pixart_sigma_to_diffusers.py of diffusers.

    Args:
        checkpoint: emptied.
        config: not read; every key map takes one.
    """
    converted: dict[str, Rows | None] = {}
    for name in list(checkpoint):
        rows = checkpoint.pop(name)
        if name in ("pos_embed", "y_embedder.y_embedding"):  # computed; the caption of no prompt
            continue
        for old, new in _PIXART:
            name = old.sub(new, name, count=1) if old.match(name) else name
        fused = next((one for one in _PIXART_FUSED if f".{one}." in name and ".attn1." not in name), None)
        if fused is None:
            converted[name] = rows
            continue
        parts = _PIXART_FUSED[fused]
        for part, piece in zip(parts, rows.chunk(len(parts)), strict=True):
            converted[name.replace(fused, part)] = piece
    return converted
