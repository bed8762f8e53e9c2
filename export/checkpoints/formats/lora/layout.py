"""Which tensors of the model a LoRA file changes, whatever layout its keys have.

Most files name the modules as diffusers does, with a prefix and perhaps with "_" for ".": they are looked up
among the model's own modules. Other layouts (Kohya, BFL, XLabs, ai-toolkit) name those of the original model,
where one matrix holds queries, keys and values. diffusers' own loaders translate these. They are run here on
small tensors that hold row numbers, so that the result shows where every row belongs, and what a loader would
leave out is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditf.export.checkpoints.formats.lora.file import LoraFile, Part
from ditf.export.checkpoints.formats.lora.original import original_modules
from ditf.runtime.errors import InputError

_LOADERS = {
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "ChromaTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "AuraFlowTransformer2DModel": "AuraFlowLoraLoaderMixin",
    "Lumina2Transformer2DModel": "Lumina2LoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}
"""Classes of transformers, and the classes of `diffusers.loaders` that read their LoRAs."""

_PREFIXES = (
    *("base_model.model.", "transformer.", "diffusion_model.", "model.diffusion_model.", "unet."),
    *("lora_transformer_", "lora_unet_", "lycoris_"),
)

_ENCODERS = (
    (r"(text_encoder(?:_\d)?)\.", None),
    (r"lora_te_|lora_te1_|text_encoders\.clip_l\.transformer\.", "text_encoder"),
    (r"lora_te2_|text_encoders\.clip_g\.transformer\.", "text_encoder_2"),
    (r"lora_te3_|text_encoders\.\w+\.(?:transformer\.)?", "the last"),
)
"""Prefixes of the modules of text encoders, and which one is meant; None for the one that is named."""


@dataclass(frozen=True)
class Placed:
    """A part of a LoRA file, and the module of the model that it changes.

    Attributes:
        rows: the rows of B that belong to this module; None for all.
    """

    part: Part
    module: str
    rows: torch.Tensor | None = None


def component_of(module: str, encoders: Sequence[str]) -> tuple[str, str]:
    """The component that a module of a file belongs to, and the module's name without that prefix.

    Args:
        encoders: the names of the model's text encoders.
    """
    for pattern, encoder in _ENCODERS:
        match = re.match(pattern, module)
        if match:
            last = max(encoders, default="text_encoder")
            return (last if encoder == "the last" else encoder or match[1]), module[match.end() :]
    return "transformer", module


def place(
    file: LoraFile,
    component: str,
    encoders: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    model: str,
) -> list[Placed]:
    """Find the modules that the parts of a file for one component change.

    A part that holds zeros and has no place is left out.

    Args:
        component: "transformer" or a text encoder.
        encoders: the names of the model's text encoders.
        shapes: of the component's tensors.
        model: the class of the transformer.

    Raises:
        InputError: a module is not in the model; the message names the first such tensor of the file.
    """
    parts = [part for part in file.parts.values() if component_of(part.module, encoders)[0] == component]
    known = _Modules(shapes, model if component == "transformer" else "")
    placed: list[Placed] = []
    rest: list[Part] = []
    for part in parts:
        found = known.find(component_of(part.module, encoders)[1])
        placed += [Placed(part, module, rows) for module, rows in found]
        rest += [] if found else [part]
    if rest and component != "transformer" and not all(map(file.is_zero, rest)):
        raise _no_place(file, next(part for part in rest if not file.is_zero(part)), component, model)
    if rest and component == "transformer":
        placed += _placed_by_loader(file, parts, rest, placed, known, model)
    _check_once(file, placed)
    return placed


def _placed_by_loader(
    file: LoraFile,
    parts: Sequence[Part],
    rest: Sequence[Part],
    direct: Sequence[Placed],
    known: _Modules,
    model: str,
) -> list[Placed]:
    """Find the modules of the parts in `rest`, those whose names the model does not have."""
    whole = _translated(file, [part for part in parts if part.up is not None], model, known)
    together = whole or _translated(file, [part for part in rest if part.up is not None], model, known)
    placed = [one for one in together if one.part in rest]
    done = {one.part for one in placed}
    for part in rest:
        if part in done or file.is_zero(part):
            continue
        alone = _translated(file, [part], model, known)
        if not alone:
            raise _no_place(file, part, "transformer", model)
        # Some files hold the same change twice, in two layouts; the loader has left one of them out.
        covered = {one.module for one in (*direct, *placed)}
        if not whole or not covered.issuperset(one.module for one in alone):
            placed += alone
    return placed


class _Modules:
    """The modules of a model that have weights, found by the names that LoRA files use.

    Args:
        shapes: of the model's tensors.
        model: the class of a transformer, whose original names are known too; "" for other models.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
        self._names = {name.rpartition(".")[0] for name in shapes}
        self._places: dict[str, list[tuple[str, torch.Tensor | None]]] = {}
        for name, places in original_modules(model, shapes).items():
            self._places[_flat(name)] = places
        for name in self._names:
            for known in (name, name.removeprefix("text_model.")):
                self._places[_flat(known)] = [(name, None)]

    def has(self, name: str) -> bool:
        return name in self._names

    def find(self, name: str) -> list[tuple[str, torch.Tensor | None]]:
        """The modules that a file's name means, each with its rows; [] if it is in another layout."""
        name = _bare(name).replace(".processor.", ".").removesuffix("_lora")
        name = name + ".0" if name.endswith(".to_out") and not self.has(name) else name
        flat = _flat(name)
        return self._places.get(flat) or self._places.get(flat.removeprefix("text_model_")) or []


def _bare(name: str) -> str:
    """A module's name in a file without the prefix of the trainer."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _flat(name: str) -> str:
    return name.replace(".", "_").rstrip("_")  # some trainers end every name with "_"


def _translated(file: LoraFile, parts: Sequence[Part], model: str, known: _Modules) -> list[Placed]:
    """Run diffusers' loader of a model's LoRAs on row numbers; [] if it does not know the layout.

    The loader gets the keys of the file and, where that does not help, Kohya's for the same modules.
    """
    import diffusers.loaders

    loader = getattr(diffusers.loaders, _LOADERS.get(model, ""), None)
    placed: list[Placed] = []
    for kohya in (False, True):
        if loader is not None and not placed:
            placed = _loaded(loader, file, parts, kohya)
            placed = placed if all(known.has(one.module) for one in placed) else []
    return placed


def _loaded(loader: Any, file: LoraFile, parts: Sequence[Part], kohya: bool) -> list[Placed]:
    """Run a loader. A part's B becomes a column of its row numbers and its A the part's own number."""
    state: dict[str, torch.Tensor] = {}
    shapes = file.tensors.shapes
    numbered = [part for part in parts if part.up or part.difference or part.bias_difference]
    for number, part in enumerate(numbered):
        down, up, alpha = part.down, part.up, part.alpha
        if kohya or down is None or up is None:
            name = f"lora_unet_{_flat(_bare(part.module))}"
            down, up, alpha = f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"
        rows = shapes[part.up or part.difference or part.bias_difference or part.key][0]
        state[down] = torch.full((1, 1), float(number))
        state[up] = torch.arange(rows, dtype=torch.float32)[:, None]
        if part.alpha is not None and alpha is not None:
            state[alpha] = torch.ones(shapes[part.alpha])
    try:
        made = loader.lora_state_dict(state) if state else {}
    except Exception:  # whatever a loader raises on keys that it was not made for
        return []
    placed = []
    for key, value in made.items():
        module, sign, _ = key.removeprefix("transformer.").rpartition(".lora_A.weight")
        ups = made.get(key.replace(".lora_A.", ".lora_B."))
        if sign and ups is not None:
            placed.append(Placed(numbered[int(value[0, 0])], module, ups[:, 0].to(torch.int64)))
    return placed


def _check_once(file: LoraFile, placed: Sequence[Placed]) -> None:
    changed: dict[str, Part] = {}
    for one in placed:
        other = changed.setdefault(one.module, one.part)
        if other is not one.part:
            raise InputError(
                f"--lora {file.path} changes {one.module} twice, in {other.key} and in {one.part.key}",
                "save the LoRA again, in one layout",
            )


def _no_place(file: LoraFile, part: Part, component: str, model: str) -> InputError:
    what = model if component == "transformer" else component
    other = re.search(r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks", part.module)
    return InputError(
        f"{part.key} of --lora {file.path} does not fit: this {what} has no module of that name and shape",
        "it is a LoRA of a UNet, such as Stable Diffusion 1 or XL: pass a LoRA of this model"
        if other
        else "pass a LoRA of this model",
    )
