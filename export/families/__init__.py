"""Model families: each has one file, which holds every fact about it."""

from __future__ import annotations

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.loading import current_class, full_config
from ditf.export.families.auraflow import AuraFlow
from ditf.export.families.base import Family
from ditf.export.families.chroma import Chroma
from ditf.export.families.dit import DiT
from ditf.export.families.flux import Flux
from ditf.export.families.flux2 import Flux2
from ditf.export.families.lumina2 import Lumina2
from ditf.export.families.pixart import PixArt
from ditf.export.families.sd3 import SD3
from ditf.export.families.zimage import ZImage
from ditf.runtime.errors import InputError

FAMILIES: tuple[type[Family], ...] = (DiT, PixArt, SD3, Flux, Flux2, AuraFlow, Lumina2, ZImage, Chroma)


def family_of(checkpoint: Checkpoint, text_padding: str | None = None) -> Family:
    """The family of a checkpoint, by the class of its transformer.

    Args:
        text_padding: the value of --text-padding, or None.

    Raises:
        InputError: the class is not supported; lists those that are. Or the family has no such text padding.
        MissingComponent: the installed diffusers lacks the class.
    """
    config = checkpoint.config("transformer")
    name = current_class(config)
    for family in FAMILIES:
        if name == family.transformer_class:
            made = family(full_config(name, config))
            if text_padding is not None:
                _check_text_padding(made, text_padding)
                made.text_padding = text_padding
            return made
    if "_class_name" not in config:
        raise InputError(f"{checkpoint.id}: transformer/config.json names no class", "save the model again")
    supported = ", ".join(f"{family.name} ({family.transformer_class})" for family in FAMILIES)
    raise InputError(f"{checkpoint.id} is a {name}, which is not supported", f"supported: {supported}")


def _check_text_padding(family: Family, text_padding: str) -> None:
    if text_padding not in family.text_paddings:
        raise InputError(
            f"--text-padding {text_padding}: {family.name} reads its text in one way",
            "leave --text-padding out",
        )
