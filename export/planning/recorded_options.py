"""The options of an export, as the manifest of its bundle records them."""

from __future__ import annotations

from pathlib import Path

from ditf.export.planning.export_options import ExportOptions
from ditf.runtime.bundles.manifest import Manifest


def recorded_options(
    manifest: Manifest, model: str | None = None, prompt_embeds: tuple[Path, ...] = ()
) -> ExportOptions:
    """The options that describe a bundle's model, feature, size, noise and first condition.

    Precision, batch and how the graph takes its condition are left at their defaults.

    Args:
        model: directory or hub id, taken as it is; by default the manifest's, with its LoRAs.
        prompt_embeds: files of embeddings in place of the prompt.
    """
    vae = manifest.vae or {}
    prompt = manifest.prompt if not prompt_embeds else None
    return ExportOptions(
        model=model or str(manifest.model["id"]),
        base=None if model else manifest.model.get("base"),
        revision=None if model else manifest.model["revision"],
        variant=manifest.model.get("variant"),
        vae=vae.get("id"),
        vae_revision=vae.get("revision"),
        layer=str(manifest.layer),
        timestep=(manifest.timestep,),
        prompt=() if prompt is None else (prompt,),
        prompt_embeds=prompt_embeds,
        conditioning="bank" if len(prompt_embeds) > 1 else "bake",
        class_label=() if manifest.class_label is None else (str(manifest.class_label),),
        guidance=manifest.guidance,
        lora=() if model else tuple(f"{lora['file']}={lora['scale']}" for lora in manifest.lora),
        text_tokens=manifest.text_tokens,
        text_padding=manifest.text_padding,
        size=manifest.size,
        seed=manifest.seed,
        ensemble=manifest.ensemble,
        discard=tuple(manifest.discard["channels"]) or "none",
        discard_stage=manifest.discard["stage"],
        adaln=manifest.adaln,
    )
