"""The baseline that `ditf bench` times a bundle against: the unmodified model in PyTorch up to its layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import encode
from ditf.export.planning.plan import make_plan
from ditf.export.planning.recorded_options import recorded_options
from ditf.runtime.bundles.manifest import Manifest
from ditf.runtime.errors import InputError

BASELINES = ("eager", "compile")


class TorchBaseline:
    """The unmodified diffusers model; `detail` says on which device, in which type and how it runs."""

    def __init__(self, reference: Reference, settings: FeatureSettings, detail: str) -> None:
        self._reference = reference
        self._settings = settings
        self.detail = detail

    def features(self, image: np.ndarray) -> np.ndarray:
        """The features, float32 [C, h, w], of an image uint8 [H, W, 3] at the bundle's size."""
        return self._reference.features(self._reference.hidden_states(image), self._settings)


@contextmanager
def torch_baseline(manifest: Manifest, name: str, model: str | None = None) -> Iterator[TorchBaseline]:
    """Open the model that a bundle was exported from in PyTorch.

    It runs on the GPU if there is one, in float16 unless the bundle is float32. Else it runs on the CPU in
    float32, the type that PyTorch is fastest in there. As in the bundle, float32 is not rounded to TF32. A
    bundle's LoRAs are left out: they change values and no shapes, so the time is the same.

    Args:
        manifest: the bundle's.
        name: one of `BASELINES`: "eager", or "compile" for torch.compile.
        model: directory or hub id; the manifest's by default.

    Raises:
        DitfError: the model cannot be found or opened, or it is of another family.
    """
    options = recorded_options(manifest, model)
    gpu = torch.cuda.is_available()
    half = gpu and manifest.precision != "float32"
    device, dtype = ("cuda" if gpu else "cpu"), (torch.float16 if half else torch.float32)
    with _float32_convolutions(), open_checkpoint(**options.opened) as checkpoint:
        plan = make_plan(options, checkpoint)
        if plan.family.name != manifest.model["family"]:
            raise InputError(f"{options.model} is not the {manifest.model['family']} of this bundle")
        with torch.no_grad():
            entry = encode(plan.entries, plan.family, plan.checkpoint, plan.guidance)[0]
            reference = Reference(
                plan.checkpoint,
                plan.family,
                plan.layer,
                plan.size,
                plan.noise(),
                plan.latents,
                resident=True,
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
        yield TorchBaseline(reference, settings, detail)


def _float32_convolutions() -> AbstractContextManager[None]:
    """Keep cuDNN from rounding to TF32, which is its default. PyTorch's default for matrices is float32."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, allow_tf32=False)
