"""Transformers in their original layout, as ComfyUI reads them, given under the names of diffusers.

diffusers has a key map for most of these layouts: a function that takes a dict of tensors, renames them,
splits fused projections and swaps halves. It runs here on `Rows`, which stand for tensors that are not read
yet. So the map costs no memory, and a tensor is read when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError, MissingComponent

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "transformer.")
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


@dataclass(frozen=True)
class Rows:
    """A tensor that is not read yet: rows of stored tensors, one after another.

    It knows the operations of diffusers' key maps, which all act on rows: `chunk`, `split` and `torch.cat`.

    Attributes:
        parts: (name of a stored tensor, first row, row after the last), ...
        shape: of the whole.
    """

    parts: tuple[tuple[str, int, int], ...]
    shape: torch.Size

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> Rows:
        """All rows of a stored tensor; a scalar counts as one row."""
        return cls(((name, 0, shape[0] if shape else 1),), torch.Size(shape))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.chunk, torch.split):
            return getattr(args[0], function.__name__)(*args[1:], **(kwargs or {}))
        if function is torch.cat:
            return cls.joined(*args, **(kwargs or {}))
        return NotImplemented

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Rows, ...]:
        """Equal pieces, as torch.chunk.

        Raises:
            InputError: the rows are not divisible.
        """
        return self.split([self.shape[0] // chunks] * chunks, dim)

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple[Rows, ...]:
        """Pieces of the given numbers of rows, as torch.split.

        Raises:
            InputError: the sizes do not add up to the rows.
        """
        if dim != 0:
            raise ValueError(f"split along dimension {dim}")
        if sum(sizes) != self.shape[0]:
            raise InputError(
                f"{self.parts[0][0]} is {list(self.shape)}, which the key map of diffusers cannot split into"
                f" {list(sizes)} rows",
                "only models of the published width can be read from their original layout:"
                " save this one with save_pretrained",
            )
        pieces, start = [], 0
        for size in sizes:
            pieces.append(self.between(start, start + size))
            start += size
        return tuple(pieces)

    def between(self, start: int, stop: int) -> Rows:
        """Rows start..stop-1."""
        parts, offset = [], 0
        for name, first, last in self.parts:
            lower, upper = max(start - offset, 0) + first, min(stop - offset + first, last)
            if lower < upper:
                parts.append((name, lower, upper))
            offset += last - first
        return Rows(tuple(parts), torch.Size((stop - start, *self.shape[1:])))

    @classmethod
    def joined(cls, pieces: Sequence[Rows], dim: int = 0) -> Rows:
        """All rows of the pieces, as torch.cat."""
        if dim != 0 or any(piece.shape[1:] != pieces[0].shape[1:] for piece in pieces):
            raise ValueError(f"torch.cat of {[list(piece.shape) for piece in pieces]} along {dim}")
        rows = sum(piece.shape[0] for piece in pieces)
        parts = tuple(part for piece in pieces for part in piece.parts)
        return cls(parts, torch.Size((rows, *pieces[0].shape[1:])))


class RowWeights(Weights):
    """Tensors that are made of the rows of other tensors.

    Args:
        stored: the other tensors.
        rows: {name: its rows}.
    """

    def __init__(self, stored: Weights, rows: Mapping[str, Rows]) -> None:
        self._stored = stored
        self._rows = dict(rows)
        super().__init__(
            {name: tuple(value.shape) for name, value in rows.items()},
            {name: self._bytes(value) for name, value in rows.items()},
            {name: stored.dtypes[value.parts[0][0]] for name, value in rows.items()},
        )

    def _bytes(self, rows: Rows) -> int:
        total = 0
        for name, start, stop in rows.parts:
            shape = self._stored.shapes[name]
            total += self._stored.bytes_of[name] * (stop - start) // (shape[0] if shape else 1)
        return total

    def source(self, name: str) -> str:
        return self._stored.source(self._rows[name].parts[0][0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        wanted = self._rows[name].between(start, stop)
        pieces = [self._stored.rows(*part) for part in wanted.parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _load(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if not shape:
            return self._stored.rows(self._rows[name].parts[0][0], 0, 1)
        return self.rows(name, 0, shape[0])
