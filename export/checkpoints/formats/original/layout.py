"""Transformers in their original layout, as ComfyUI reads them, given under the names of diffusers.

diffusers has a key map for most of these layouts: a function that takes a dict of tensors, renames them,
splits fused projections and swaps halves. It runs here on `Rows`, which stand for tensors that are not read
yet. So the map costs no memory, and a tensor is read when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ditf.export.checkpoints.formats.original.pixart import pixart_names
from ditf.export.checkpoints.formats.original.rows import Rows, RowWeights
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError, MissingComponent

PREFIXES = (
    *("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "transformer."),
    *("module.", "_orig_mod."),  # of DistributedDataParallel and torch.compile
)
"""What stands in front of the transformer's names in whole checkpoints and in some exports."""


@dataclass(frozen=True)
class Layout:
    """Names by which the weights of a transformer are recognised.

    Attributes:
        class_name: the diffusers class.
        marks: names that are all there.
        original: False for the names of diffusers themselves.
    """

    class_name: str
    marks: tuple[str, ...]
    original: bool = True


LAYOUTS = (
    Layout("ChromaTransformer2DModel", ("distilled_guidance_layer.layers.0.in_layer.weight",)),
    Layout("Flux2Transformer2DModel", ("double_stream_modulation_img.lin.weight", "img_in.weight")),
    Layout("FluxTransformer2DModel", ("double_blocks.0.img_mod.lin.weight", "txt_in.weight")),
    Layout("SD3Transformer2DModel", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    Layout("AuraFlowTransformer2DModel", ("double_layers.0.attn.w1q.weight",)),
    Layout("ZImageTransformer2DModel", ("x_embedder.weight", "layers.0.adaLN_modulation.0.weight")),
    Layout("Lumina2Transformer2DModel", ("cap_embedder.1.weight", "layers.0.adaLN_modulation.1.weight")),
    Layout("PixArtTransformer2DModel", ("t_block.1.weight", "blocks.0.mlp.fc1.weight")),
    Layout("ChromaTransformer2DModel", ("distilled_guidance_layer.layers.0.linear_1.weight",), False),
    Layout("Flux2Transformer2DModel", ("double_stream_modulation_img.linear.weight",), False),
    Layout(
        "FluxTransformer2DModel",
        ("time_text_embed.text_embedder.linear_1.weight", "single_transformer_blocks.0.proj_mlp.weight"),
        False,
    ),
    Layout(
        "SD3Transformer2DModel",
        ("time_text_embed.text_embedder.linear_1.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
        False,
    ),
    Layout("AuraFlowTransformer2DModel", ("joint_transformer_blocks.0.attn.to_q.weight",), False),
    Layout("ZImageTransformer2DModel", ("all_x_embedder.2-1.weight",), False),
    Layout("Lumina2Transformer2DModel", ("time_caption_embed.caption_embedder.1.weight",), False),
    Layout(
        "PixArtTransformer2DModel",
        ("adaln_single.linear.weight", "caption_projection.linear_1.weight"),
        False,
    ),
    Layout(
        "DiTTransformer2DModel",
        ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",),
        False,
    ),
)
"""The layouts that can be read, those of diffusers last."""


_SCALE = re.compile(r"(norm\.(?:query|key)_norm|distilled_guidance_layer\.norms\.\d+)\.weight")
"""Norms whose parameter newer versions of ComfyUI save as weight, and the key maps call scale."""


def prefix_of(names: Iterable[str]) -> str:
    """What stands in front of a transformer's names: one of `PREFIXES`, or ""."""
    listed = list(names)
    return next((one for one in PREFIXES if any(name.startswith(one) for name in listed)), "")


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout of a transformer's weights, or None if they are no transformer that ditf exports."""
    listed = set(names)
    prefix = prefix_of(listed)
    return next((one for one in LAYOUTS if all(prefix + mark in listed for mark in one.marks)), None)


def in_diffusers_names(stored: Weights, config: Mapping[str, Any]) -> Weights:
    """The transformer's tensors of a file under the names of diffusers; no value is read.

    The tensors of text encoders and a VAE, which whole checkpoints hold too, are left out. A tensor that the
    key map does not know keeps its name, so that it is noticed.

    Args:
        stored: the tensors of the file.
        config: the transformer's, for the key map.

    Raises:
        InputError: a tensor that the key map asks for is missing, or has a shape that it cannot split.
        MissingComponent: the installed diffusers has no key map for this model.
    """
    prefix = prefix_of(stored.shapes)
    layout = layout_of(stored.shapes)
    rows = {
        name.removeprefix(prefix): Rows.of(name, shape)
        for name, shape in stored.shapes.items()
        if name.startswith(prefix)
    }
    if layout is None or not layout.original:
        return RowWeights(stored, rows)
    if layout.class_name in ("FluxTransformer2DModel", "ChromaTransformer2DModel"):
        rows = {_SCALE.sub(r"\1.scale", name): value for name, value in rows.items()}
    convert = _key_map(layout.class_name)
    first = next(iter(stored.shapes))
    try:
        converted = convert(checkpoint=rows, config=dict(config))
    except KeyError as error:
        raise InputError(
            f"{stored.source(first)}: the file lacks {prefix}{error.args[0]} of a {layout.class_name}",
            "save or download the whole model",
        ) from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise MissingComponent(
            f"the key map of this diffusers for {layout.class_name} does not fit the file ({error!r:.80})",
            "run: pip install --upgrade diffusers",
        ) from error
    found = {name: value for name, value in converted.items() if value is not None}
    return RowWeights(stored, {**rows, **found} if converted is not rows else found)


def _key_map(class_name: str) -> Callable[..., dict[str, Rows | None]]:
    """The function of diffusers that turns the original names of a class into its own."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if class_name == "PixArtTransformer2DModel":
        return pixart_names
    if class_name not in SINGLE_FILE_LOADABLE_CLASSES:
        raise MissingComponent(
            f"the installed diffusers cannot read single files of {class_name}",
            "run: pip install --upgrade diffusers",
        )
    key_map: Callable[..., dict[str, Rows | None]] = SINGLE_FILE_LOADABLE_CLASSES[class_name][
        "checkpoint_mapping_fn"
    ]
    return key_map
