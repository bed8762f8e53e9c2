"""What a bundle is measured against: the unmodified model in PyTorch, stopped at the bundle's layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import encode
from ditf.export.planning.options import ExportOptions
from ditf.export.planning.plan import make_plan
from ditf.runtime.bundles.manifest import Manifest
from ditf.runtime.errors import InputError

PEERS = ("eager", "compile")


class TorchPeer:
    """The unmodified diffusers model; `detail` says how it runs."""

    def __init__(self, reference: Reference, settings: FeatureSettings, detail: str) -> None:
        self._reference = reference
        self._settings = settings
        self.detail = detail

    def features(self, image: np.ndarray) -> np.ndarray:
        """The feature [C, h, w] of uint8 [H, W, 3] at the bundle's size."""
        return self._reference.features(self._reference.hidden_states(image), self._settings)


@contextmanager
def torch_peer(manifest: Manifest, name: str, model: str | None = None) -> Iterator[TorchPeer]:
    """The model a bundle was exported from, opened in PyTorch: on the GPU in the bundle's precision if
    there is one, else on the CPU in float32, which is what PyTorch is fast in there.

    Args:
        name: one of `PEERS`.
        model: directory or hub id; the manifest's by default.

    Raises:
        DitfError: the model is not there, or is another.
    """
    options = ExportOptions(
        model=model or str(manifest.model["id"]),
        revision=None if model else manifest.model["revision"],
        vae=None if manifest.vae is None else manifest.vae["id"],
        vae_revision=None if manifest.vae is None else manifest.vae["revision"],
        layer=str(manifest.layer),
        timestep=(manifest.timestep,),
        prompt=() if manifest.prompt is None else (manifest.prompt,),
        class_label=() if manifest.class_label is None else (str(manifest.class_label),),
        guidance=manifest.guidance,
        text_tokens=None,
        size=manifest.size,
        seed=manifest.seed,
        ensemble=manifest.ensemble,
    )
    gpu = torch.cuda.is_available()
    half = gpu and manifest.precision != "float32"
    device, dtype = ("cuda" if gpu else "cpu"), (torch.float16 if half else torch.float32)
    with open_checkpoint(options.model, options.revision) as checkpoint:
        plan = make_plan(options, checkpoint)
        if plan.family.name != manifest.model["family"]:
            raise InputError(f"{options.model} is not the {manifest.model['family']} of this bundle")
        with torch.no_grad():
            entry = encode(plan.entries, plan.family, checkpoint, plan.guidance)[0]
            reference = Reference(
                checkpoint, plan.family, plan.layer, plan.size, plan.noise(), plan.latents, resident=True
            )
            reference.moved(device, dtype, compiled=name == "compile")
            reference.under(entry.condition, entry.timestep)
        discard = manifest.discard
        settings = FeatureSettings(discard["channels"], discard["stage"], manifest.adaln)
        how = "torch.compile" if name == "compile" else "eager"
        threads = "" if gpu else f", {torch.get_num_threads()} threads"
        detail = f"torch {torch.__version__} {how}, {device}, {dtype}{threads}".replace(
            "torch.float", "float"
        )
        yield TorchPeer(reference, settings, detail)
