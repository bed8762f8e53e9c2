"""`ditf check --independent`: golden outputs made again, by the checkpoint's own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ditf.calib.images import golden_pair
from ditf.calib.memory import available_bytes
from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.estimate.estimate import Estimate
from ditf.export.families import family_of
from ditf.export.graph.features import FeatureSettings
from ditf.export.measure.golden import GoldenCase, GoldenOutputs, golden_cases, golden_outputs
from ditf.export.measure.images import CalibrationImages
from ditf.export.measure.oracle.choice import why_not
from ditf.export.measure.oracle.oracle import Oracle
from ditf.export.measure.oracle.own_pipeline import OwnPipeline
from ditf.export.planning.conditions import Entry
from ditf.export.planning.plan import Plan, make_plan
from ditf.export.planning.recorded_options import recorded_options
from ditf.runtime.bundles.bundle import PROJECTION, Bundle
from ditf.runtime.bundles.manifest import Manifest
from ditf.runtime.errors import InputError, MissingComponent

_NAME_IT = "name it with --model DIR|ID"


def independent_golden(
    bundle: Bundle,
    model: str | None = None,
    images: Path | None = None,
    prompt_embeds: tuple[Path, ...] = (),
) -> GoldenOutputs:
    """Make a bundle's golden outputs with the pipeline of its checkpoint (`ditf.export.measure.oracle`).

    Args:
        model: directory or hub id of the checkpoint; the one in the manifest by default.
        images: a folder of at least two images; the golden pair by default.
        prompt_embeds: the files that the bundle was exported with, if it was.

    Raises:
        InputError: the checkpoint is not there, is not the bundle's, cannot be loaded independently, or needs
            more memory than there is.
    """
    manifest = bundle.manifest
    pictures = _pictures(manifest, images)
    options = recorded_options(manifest, model, prompt_embeds)
    try:
        with open_checkpoint(**options.opened) as checkpoint, torch.no_grad():
            _check_same(checkpoint, manifest.model["family"] == family_of(checkpoint).name)
            plan = make_plan(options, checkpoint)
            _check_same(checkpoint, manifest.grid == plan.grid)
            reason = why_not(plan, Estimate(plan).oracle_bytes, available_bytes())
            if reason is not None:
                raise InputError(
                    f"{options.model} cannot be its own judge: {reason}",
                    "save this model as a diffusers directory and name it with --model DIR, or leave"
                    " --independent out",
                )
            return _outputs(plan, _entries(plan, manifest), bundle, pictures)
    except (InputError, MissingComponent) as error:
        if model is None and not Path(options.model).exists() and "no such directory" in error.problem:
            raise InputError(f"the model of {bundle.path} is not here: {error.problem}", _NAME_IT) from error
        raise


def _outputs(plan: Plan, entries: list[Entry], bundle: Bundle, images: np.ndarray) -> GoldenOutputs:
    manifest = bundle.manifest
    discard = manifest.discard
    settings = FeatureSettings(discard["channels"], discard["stage"], manifest.adaln)
    indices = manifest.golden.get("conditions") or golden_cases(len(entries))
    cases = [GoldenCase(index, entries[index]) for index in indices]
    approximates = manifest.vae is not None or manifest.text_tokens is not None
    projection = bundle.read_array(PROJECTION) if manifest.pca is not None else None
    oracle = Oracle(plan, OwnPipeline(plan, entries))
    whole = entries[0] if approximates else None
    return golden_outputs(oracle, images, settings, manifest.seed, cases, whole, projection)


def _entries(plan: Plan, manifest: Manifest) -> list[Entry]:
    """The conditions of a bundle; embeddings are those of --prompt-embeds.

    Raises:
        InputError: a condition is of embeddings that are not given, and of no known prompt.
    """
    given = {entry.embeds: entry.condition for entry in plan.entries if entry.embeds is not None}
    entries = []
    for one in manifest.conditions:
        embeds = one.get("prompt_embeds") if given else None
        if given and embeds not in given:
            raise InputError(
                f"the condition {one['name']!r:.60} is of none of the files of --prompt-embeds",
                "give those that the bundle was exported with",
            )
        if plan.family.takes_prompt and not given and one["prompt"] is None:
            raise InputError(
                f"the condition {one['name']!r:.60} is of embeddings whose prompt is not known",
                "give the file that the bundle was exported with: --prompt-embeds FILE",
            )
        condition = {} if embeds is None else given[embeds]
        label = one["class_label"]
        entries.append(Entry(one["name"], one["prompt"], label, one["timestep"], condition, embeds))
    return entries


def _check_same(checkpoint: Checkpoint, same: bool) -> None:
    if not same:
        raise InputError(f"{checkpoint.id} is not the model of this bundle", _NAME_IT)


def _pictures(manifest: Manifest, folder: Path | None) -> np.ndarray:
    if folder is None:
        return golden_pair(manifest.size)
    arrays = CalibrationImages(folder, manifest.size).arrays
    if len(arrays) < 2:
        raise InputError(f"--images {folder} has one image", "give two or more: the first two are matched")
    return np.stack(arrays)
