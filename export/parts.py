"""Where the parameters of a graph are: by part and type, for the manifest and `ditf inspect`."""

from __future__ import annotations

from torch import nn

_PARTS = (  # first match wins
    ("encoder.", "VAE encoder"),
    ("trunk.embedder.", "patch and position embedders"),
    (".gate", "modulation and gates"),
    (".norm_", "modulation and gates"),
    ("trunk.output_norm.", "modulation and gates"),
    (".cross_attention.", "cross-attention"),
    (".attention.", "self-attention"),
    (".feed_forward.", "feed-forward"),
    ("noise", "noise"),
    ("keep", "discard mask"),
)


def parameter_parts(module: nn.Module) -> dict[str, dict[str, dict[str, int]]]:
    """{part: {dtype: {"parameters": n, "bytes": n}}} of a graph module."""
    parts: dict[str, dict[str, dict[str, int]]] = {}
    for name, tensor in module.named_parameters():
        part = next(label for pattern, label in _PARTS if pattern in name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        entry = parts.setdefault(part, {}).setdefault(dtype, {"parameters": 0, "bytes": 0})
        entry["parameters"] += tensor.numel()
        entry["bytes"] += tensor.numel() * tensor.element_size()
    return parts
