"""`ditf calibrate`: the activations of the unmodified model, block by block, over images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditf.calib.blocks import BlockMeasurement, Entering, degenerate, mismatches
from ditf.calib.images import COUNT, procedural_images
from ditf.calib.recipe import FEATURES, Extent
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.checkpoints.weight_spill import spilling
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.activation_ranges import measure_ranges
from ditf.export.measure.reference_model import Reference
from ditf.export.planning.conditions import Entry, encode, trim
from ditf.export.planning.options import ExportOptions
from ditf.export.planning.plan import Plan, make_plan
from ditf.runtime.bundles.manifest import tool_versions
from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json
from ditf.runtime.images import fit_image, list_images, open_image

_LARGEST = 128 << 20  # bytes of a calibration

SCHEMA = 1

Progress = Callable[[str], None]


def stage_count(options: ExportOptions) -> int:
    """Times that `calibrate` reports progress: loading, every image, and the ranges.

    Raises:
        InputError: a folder that is none, or has no images.
    """
    folder = options.calibration_images
    return 2 + (COUNT if folder is None else len(list_images(folder)))


def calibrate(
    options: ExportOptions, progress: Progress = lambda line: None, folder: Path | None = None
) -> dict[str, Any]:
    """Run the unmodified model over images and collect what enters blocks 0..k.

    Args:
        options: as for an export; `calibration_images` is a folder, the built-in pictures by default.
        progress: called with a line for people for every image.
        folder: with room for the graph's weights in float32; the system's temporary one by default.

    Returns:
        The document of calibration.json.

    Raises:
        DitfError: anything wrong with the options, the checkpoint or the images; activations that are NaN or
            infinite, with the first block that has them.
    """
    with open_checkpoint(options.model, options.revision, options.variant, options.unneeded) as checkpoint:
        plan = make_plan(options, checkpoint)
        progress(f"{plan.family.blocks.describe(plan.layer)}; loading the unmodified model")
        with torch.no_grad():
            encoded = encode(plan.entries, plan.family, checkpoint, plan.guidance)
        live = options.conditioning == "live"
        entries = trim(encoded, plan.family, live, options.text_tokens)
        noise = plan.noise()
        reference = Reference(checkpoint, plan.family, plan.layer, plan.size, noise, plan.latents)
        found = observe(plan, reference.under(entries[0].condition, entries[0].timestep), progress)
        del reference
        progress("measuring every value that float16 would hold")
        with spilling(folder or Path(tempfile.gettempdir())):
            return {**found.document, **ranges_of(plan, found, entries, noise)}


@dataclass(frozen=True)
class Observed:
    """What the unmodified model showed.

    Attributes:
        document: of calibration.json, but for the ranges.
        hidden_states: [N, C] float32, what enters block k on the first image.
    """

    document: dict[str, Any]
    hidden_states: np.ndarray


def ranges_of(plan: Plan, found: Observed, entries: Sequence[Entry], noise: torch.Tensor) -> dict[str, Any]:
    """For calibration.json, on its images: `ranges`, and `inputs`, maxima of linears' input channels."""
    _, images = calibration_images(plan.options.calibration_images, plan.size)
    channels = massive_channels(found.document) if plan.discard is None else plan.discard
    settings = FeatureSettings(channels, plan.options.discard_stage, plan.options.adaln)
    extents, maxima = measure_ranges(plan, entries, noise, images, found.hidden_states, settings)
    return {
        "ranges": [extent.to_json() for extent in extents],
        "inputs": {
            name: [float(f"{value:.3g}") for value in values.tolist()] for name, values in maxima.items()
        },
    }


def observe(plan: Plan, reference: Reference, progress: Progress = lambda line: None) -> Observed:
    """Run a reference under its condition over the calibration images."""
    names, images = calibration_images(plan.options.calibration_images, plan.size)
    blocks = plan.family.blocks
    measurement = BlockMeasurement(
        [".".join(map(str, blocks.locate(index))) for index in range(plan.layer + 1)],
        centred=not plan.family.rms_norms,
    )
    last: list[np.ndarray] = []

    def visit(layer: int, entering: Entering) -> None:
        measurement.add(layer, entering)
        if layer == plan.layer and not last:
            last.append(entering.image.copy())

    for number, (name, image) in enumerate(zip(names, images, strict=True), start=1):
        progress(f"image {number} of {len(images)}: {name}")
        reference.trace(image, visit)
    document = {
        "schema": SCHEMA,
        "model": plan.checkpoint.id,
        "revision": plan.checkpoint.revision,
        **identity(plan),
        "images": {
            "count": len(images),
            "source": str(plan.options.calibration_images or "built-in procedural pictures"),
            "names": names,
            "warning": degenerate(images),
        },
        "published_channels": _listed(plan.family.defaults.channels),
        "layers": [
            {"module": plan.family.block_name(layer.layer), **layer.to_json()}
            for layer in measurement.finish()
        ],
        "versions": tool_versions("ditf", "torch", "diffusers", "transformers"),
    }
    return Observed(document, last[0])


def massive_channels(document: Mapping[str, Any]) -> list[int]:
    """Massive channels of what enters block k, ascending."""
    return [entry["channel"] for entry in document["layers"][-1]["image"]["massive_channels"]]


def read_extents(document: Mapping[str, Any]) -> list[Extent]:
    """The ranges of a calibration; KeyError, TypeError or ValueError where they are none."""
    return [Extent.from_json(entry) for entry in document["ranges"]]


def read_maxima(document: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Maxima of the inputs of linears; KeyError, TypeError or ValueError where they are none."""
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in document["inputs"].items()}


def read_calibration(path: Path, plan: Plan) -> dict[str, Any]:
    """A file that `ditf calibrate` wrote, for this very export.

    Raises:
        InputError: unreadable, not a calibration, or of another model, layer, timestep, condition or size.
    """
    fix = "make one with ditf calibrate"
    try:
        document = read_json(path, _LARGEST)
        channels = massive_channels(document)
        if plan.precision.compute != torch.float32:
            if "ranges" not in document:
                raise InputError(f"--calibration {path} has no ranges: it is a float32 bundle's", fix)
            extents = read_extents(document)
            read_maxima(document)
            if plan.features_in_ranges and not any(extent.name == FEATURES for extent in extents):
                raise InputError(f"--calibration {path} has the range of another feature", fix)
        if any(not 0 <= channel < plan.family.channels for channel in channels):
            raise ValueError("channels the model does not have")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--calibration {path} is no calibration ({error!r:.80})", fix) from error
    wrong = mismatches(document, identity(plan))
    if wrong:
        raise InputError(f"--calibration {path} has {wrong[0]}", fix)
    found: dict[str, Any] = document
    return found


def identity(plan: Plan) -> dict[str, Any]:
    """What a calibration is of, and what an export that uses it must agree with: not where the model lies."""
    given = [entry.embeds for entry in plan.entries if entry.embeds is not None]
    vae = plan.latents.source
    return {
        "weights": plan.checkpoint.weights("transformer").fingerprint(),
        "vae": None if vae is None else vae.weights().fingerprint(),
        "guidance": plan.guidance,
        "layer": plan.layer,
        "timestep": plan.entries[0].timestep,
        "conditioning": plan.options.conditioning,
        "conditions": [entry.name for entry in plan.entries],
        "text_tokens": plan.options.text_tokens,
        "size": list(plan.size),
        **({"prompt_embeds": given} if given else {}),
    }


def calibration_images(folder: Path | None, size: tuple[int, int]) -> tuple[list[str], list[np.ndarray]]:
    """Names and pictures, uint8 [H, W, 3] at `size`: a folder's, or the built-in ones."""
    if folder is None:
        pictures = procedural_images(size)
        return [f"procedural {index}" for index in range(len(pictures))], pictures
    paths = list_images(folder)
    return [path.name for path in paths], [fit_image(open_image(path), size)[0] for path in paths]


def _listed(channels: Sequence[int] | None) -> list[int] | None:
    return None if channels is None else list(channels)
