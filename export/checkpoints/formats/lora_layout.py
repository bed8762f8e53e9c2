"""Which tensors of the model a LoRA file changes, whatever layout its keys have.

Most files name the modules as diffusers does, with a prefix and perhaps with "_" for ".": they are looked up
among the model's own modules. Other layouts (Kohya, BFL, XLabs, ai-toolkit) name those of the original model,
where one matrix holds queries, keys and values. diffusers' own loaders translate these. They are run here on
small tensors that hold row numbers, so that the result shows where every row belongs, and what a loader would
leave out is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ditf.export.checkpoints.formats.lora_file import LoraFile, Part
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
    file: LoraFile, component: str, encoders: Sequence[str], names: Iterable[str], model: str
) -> list[Placed]:
    """Find the modules that the parts of a file for one component change. Parts that are zero are left out.

    Args:
        component: "transformer" or a text encoder.
        encoders: the names of the model's text encoders.
        names: of the component's tensors.
        model: the class of the transformer.

    Raises:
        InputError: a module is not in the model; the message names the first such tensor of the file.
    """
    parts = [part for part in file.parts.values() if component_of(part.module, encoders)[0] == component]
    known = _Modules(names)
    direct: dict[str, str] = {}
    for part in parts:
        module = known.find(component_of(part.module, encoders)[1])
        if module is not None:
            direct[part.module] = module
    rest = [part for part in parts if part.module not in direct]
    placed: list[Placed] = []
    if rest and component == "transformer":
        placed = _translated(file, parts, model) or _translated(file, rest, model)
    for one in placed:
        if not known.has(one.module) and one.part.module not in direct:
            raise _no_place(file, one.part, component, model, f"there is no {one.module}")
    placed = [one for one in placed if known.has(one.module)]
    translated = {one.part.module for one in placed}
    placed += [Placed(file.parts[name], module) for name, module in direct.items() if name not in translated]
    covered = {one.module for one in placed}
    for part in rest:
        if part.module in translated or file.is_zero(part):
            continue
        alone = _translated(file, [part], model) if component == "transformer" else []
        # Some files hold the same change twice, in two layouts. diffusers reads one of them too.
        if not alone or not covered.issuperset(one.module for one in alone):
            raise _no_place(file, part, component, model, "no module of the model has this name")
    _check_once(file, placed)
    return placed


class _Modules:
    """The modules of a model that have weights, found by the names that LoRA files use."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name.rpartition(".")[0] for name in names}
        self._flat: dict[str, str] = {}
        for name in self._names:
            for known in (name, name.removeprefix("text_model.")):
                self._flat[known.replace(".", "_")] = name

    def has(self, name: str) -> bool:
        return name in self._names

    def find(self, name: str) -> str | None:
        """The module that a file's name means; None if it is in another layout."""
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        name = name.replace(".processor.", ".").removesuffix("_lora")
        name = name + ".0" if name.endswith(".to_out") and not self.has(name) else name
        flat = name.replace(".", "_").rstrip("_")  # some trainers end every name with "_"
        return self._flat.get(flat) or self._flat.get(flat.removeprefix("text_model_"))


def _translated(file: LoraFile, parts: Sequence[Part], model: str) -> list[Placed]:
    """Run diffusers' loader of a model's LoRAs on row numbers; [] if it does not know the layout.

    A part's B becomes a column of its row numbers and its A the part's own number, both of rank 1.
    """
    import diffusers.loaders

    loader = getattr(diffusers.loaders, _LOADERS.get(model, ""), None)
    if loader is None:
        return []
    state: dict[str, torch.Tensor] = {}
    numbered = [part for part in parts if part.up or part.difference or part.bias_difference]
    for number, part in enumerate(numbered):
        down, up, rows = _keys(file, part)
        state[down] = torch.full((1, 1), float(number))
        state[up] = torch.arange(rows, dtype=torch.float32)[:, None]
        if part.alpha is not None:
            state[part.alpha] = torch.ones(file.tensors.shapes[part.alpha])
    try:
        made = loader.lora_state_dict(state)
    except Exception:  # whatever a loader raises on keys that it was not made for
        return []
    placed = []
    for key, value in made.items():
        module, sign, _ = key.removeprefix("transformer.").rpartition(".lora_A.weight")
        ups = made.get(key.replace(".lora_A.", ".lora_B."))
        if sign and ups is not None:
            part, rows = numbered[int(value[0, 0])], ups[:, 0].to(torch.int64)
            placed.append(Placed(part, module, rows))
    return placed


def _keys(file: LoraFile, part: Part) -> tuple[str, str, int]:
    """The keys of a part's factors, made up for one that has only differences, and the number of rows."""
    shapes = file.tensors.shapes
    if part.down is not None and part.up is not None:
        return part.down, part.up, shapes[part.up][0]
    rows = shapes[part.difference or part.bias_difference or part.key][0]
    kohya = any(".lora_down." in key for key in shapes) or part.module.startswith("lora_unet_")
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    return f"{part.module}.{down}.weight", f"{part.module}.{up}.weight", rows


def _check_once(file: LoraFile, placed: Sequence[Placed]) -> None:
    changed: dict[str, Part] = {}
    for one in placed:
        other = changed.setdefault(one.module, one.part)
        if other is not one.part:
            raise InputError(
                f"--lora {file.path} changes {one.module} twice, in {other.key} and in {one.part.key}",
                "save the LoRA again, in one layout",
            )


def _no_place(file: LoraFile, part: Part, component: str, model: str, why: str) -> InputError:
    what = model if component == "transformer" else component
    other = re.search(r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks", part.module)
    return InputError(
        f"{part.key} of --lora {file.path} does not fit the {what}: {why}",
        "it is a LoRA of a UNet, such as Stable Diffusion 1 or XL: pass a LoRA of this model"
        if other
        else "pass a LoRA of this model",
    )
