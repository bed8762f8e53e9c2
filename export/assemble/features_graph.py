"""Making the features graph of a plan: constants where the condition is fixed, inputs where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ditf.calib.recipe import LIMIT
from ditf.export.checkpoints.noise_schedule import NoiseLevel
from ditf.export.checkpoints.vae import TINY
from ditf.export.families.base import TrunkSpec
from ditf.export.graph.condition import (
    LEVEL,
    TIMESTEP,
    BakedCondition,
    BankedCondition,
    Conditioner,
    ConditionSource,
    LiveCondition,
    hold_projections,
)
from ditf.export.graph.features import NOISE, FeatureSettings, FeaturesGraph
from ditf.export.graph.precision import FLOAT32, Precision
from ditf.export.graph.quantised import quantise
from ditf.export.graph.vae_encoder import KLEncoder, PixelEncoder, TinyEncoder
from ditf.export.planning.conditions import Entry
from ditf.export.planning.plan import Plan

Feeds = dict[str, torch.Tensor]

_COMPUTED = {"keys", "values"}  # rows that attention reads


@dataclass(frozen=True)
class Specialised:
    """A features graph, and what it is fed beside the image.

    Attributes:
        graph: the module to trace.
        feeds: for each entry, one tensor for each of `graph.inputs`.
        condition_inputs: those of the inputs that belong to the condition.
        read_by_trunk, read_by_conditioner: names of the tensors of the checkpoint that each read.
    """

    graph: FeaturesGraph
    feeds: list[Feeds]
    condition_inputs: tuple[str, ...]
    read_by_trunk: set[str]
    read_by_conditioner: set[str]


@torch.no_grad()
def specialise(
    plan: Plan,
    entries: Sequence[Entry],
    noise: torch.Tensor,
    settings: FeatureSettings,
    projection: np.ndarray | None = None,
) -> Specialised:
    """The features graph of a plan.

    `bake` runs the family's conditioner now and makes what it says constants; `bank` runs it for every
    entry and feeds that; `live` traces it.

    Args:
        entries: encoded and trimmed alike.
        noise: eps.
        settings: the feature's definition.
        projection: P of --pca, float32 [N, C].
    """
    mode = plan.options.conditioning
    live = mode == "live"
    conditioner_weights = plan.checkpoint.weights("transformer")
    spec = TrunkSpec(
        plan.layer, plan.size, plan.grid, plan.family.text_length(entries[0].condition), plan.precision
    )
    conditioner = plan.family.conditioner(
        conditioner_weights, spec if live else replace(spec, precision=FLOAT32)
    ).eval()
    trunk_weights = plan.checkpoint.weights("transformer")
    if len(entries) > 1 and not live:
        hold_projections(conditioner)
    given = [] if live else [_given(conditioner, entry) for entry in entries]
    trunk = plan.family.trunk(trunk_weights, spec, given[0] if mode == "bake" else None)
    if plan.precision.maxima is not None:
        quantise(trunk, plan.precision.maxima, plan.precision.smooth)
    levels = [plan.levels[entry.timestep].to(torch.float32) for entry in entries]
    condition: ConditionSource
    if mode == "bake":
        signal, noise_scale = plan.levels[entries[0].timestep].tolist()
        condition = BakedCondition(NoiseLevel(signal, noise_scale))
        feeds: list[Feeds] = [{}]
    elif mode == "bank":
        condition = BankedCondition(tuple(given[0]))
        feeds = [
            {**_stored(row, plan.precision), LEVEL: level} for row, level in zip(given, levels, strict=True)
        ]
    else:
        condition = LiveCondition(conditioner, plan.levels.to(torch.float32))
        feeds = [
            {
                **{name: entry.condition[name] for name in conditioner.inputs},
                TIMESTEP: torch.tensor([entry.timestep]),
            }
            for entry in entries
        ]
    baked_noise = plan.options.noise == "baked"
    graph = FeaturesGraph(
        image_encoder(plan, plan.latents.load_vae() if plan.latents.vae else None),
        condition,
        trunk,
        noise,
        baked_noise,
        settings,
        plan.grid,
        plan.output_dtype,
        None if projection is None else torch.from_numpy(projection),
    )
    if not baked_noise:
        feeds = [{NOISE: noise, **feed} for feed in feeds]
    return Specialised(
        graph.eval(),
        [{name: feed[name] for name in graph.inputs} for feed in feeds],
        condition.inputs,
        trunk_weights.read,
        conditioner_weights.read,
    )


def _given(conditioner: Conditioner, entry: Entry) -> Feeds:
    made: Feeds = conditioner(torch.tensor([entry.timestep]), entry.condition)
    return made


def _stored(row: Feeds, precision: Precision) -> Feeds:
    """A row of the bank as it is kept: keys and values in the graph's precision, what adds up in float32."""
    dtype = precision.compute
    if dtype == torch.bfloat16 or any(row[name].abs().max() > LIMIT for name in _COMPUTED & row.keys()):
        dtype = torch.float32  # numpy has no bfloat16; the attention casts
    return {name: tensor.to(dtype) if name in _COMPUTED else tensor for name, tensor in row.items()}


def image_encoder(plan: Plan, vae: Any) -> nn.Module:
    """Pixels to x_0; `vae` is the unmodified one, changed in place, or None for a model in pixels."""
    latents = plan.latents
    if vae is None:
        return PixelEncoder()
    if latents.name == TINY:
        return TinyEncoder(vae, latents.shift, latents.scale, plan.precision)
    return KLEncoder(vae, *latents.shift_and_scale(vae), plan.precision, latents.patch)
