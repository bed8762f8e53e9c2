"""Assembling the features graph of a plan, from the weights of its checkpoint or from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ditf.calib.recipe import LIMIT
from ditf.export.checkpoints.latent_space import TINY
from ditf.export.checkpoints.loading import model_shapes, shape_model
from ditf.export.checkpoints.noise_schedule import NoiseLevel
from ditf.export.checkpoints.weights import MetaWeights, Weights
from ditf.export.families.base import Condition, TrunkSpec
from ditf.export.graph.condition import (
    LEVEL,
    BakedCondition,
    BankedCondition,
    Conditioner,
    ConditionSource,
    LiveCondition,
    hold_projections,
)
from ditf.export.graph.features import NOISE, FeatureSettings, FeaturesGraph
from ditf.export.graph.precision import FLOAT32, Precision
from ditf.export.graph.quantised_linears import quantise
from ditf.export.graph.vae_encoders import KLEncoder, PixelEncoder, TinyEncoder
from ditf.export.planning.conditions import Entry, example_condition, usual_text_tokens
from ditf.export.planning.plan import Plan
from ditf.runtime.bundles.conditions import TIMESTEP

Feeds = dict[str, torch.Tensor]

_COMPUTED = {"keys", "values"}  # rows of a bank that attention reads


@dataclass(frozen=True)
class AssembledGraph:
    """A features graph, and what it is fed beside the image.

    Attributes:
        graph: the module to trace.
        feeds: for each entry, one tensor for each of `graph.inputs`.
        condition_inputs: those of the inputs that belong to the condition.
        read_by_trunk, read_by_conditioner: names of the checkpoint's tensors that each has read.
    """

    graph: FeaturesGraph
    feeds: list[Feeds]
    condition_inputs: tuple[str, ...]
    read_by_trunk: set[str]
    read_by_conditioner: set[str]


@dataclass(frozen=True)
class _Source:
    """Where the tensors of a graph come from.

    Attributes:
        weights: opens the transformer's; every call gives an object that notes anew what is read.
        vae: opens the unmodified VAE.
        device: a context in which the conditioner is made and run.
    """

    weights: Callable[[], Weights]
    vae: Callable[[], Any]
    device: Callable[[], AbstractContextManager[Any]]


@torch.no_grad()
def assemble(
    plan: Plan,
    entries: Sequence[Entry],
    noise: torch.Tensor,
    settings: FeatureSettings,
    projection: np.ndarray | None = None,
) -> AssembledGraph:
    """The features graph of a plan, with its weights.

    With `bake` the family's conditioner runs now, and what it gives are constants of the graph. With `bank`
    it runs now for every entry, and the graph is fed what it gives. With `live` it is a part of the graph.

    Args:
        entries: encoded, and trimmed to the same number of text tokens.
        noise: eps, float32 [E, c, h', w'].
        settings: the feature's definition.
        projection: P of --pca, float32 [N, C], or None.

    Raises:
        InputError: a tensor is missing, cannot be read, or holds NaN or infinity.
    """
    source = _Source(lambda: plan.checkpoint.weights("transformer"), plan.latents.load_vae, nullcontext)
    matrix = None if projection is None else torch.from_numpy(projection)
    return _assemble(plan, source, entries, noise, settings, matrix)


@torch.no_grad()
def assemble_shapes(plan: Plan, condition: Condition | None = None) -> AssembledGraph:
    """The features graph of a plan on the meta device, made from configs: no weight is read.

    The rows of a bank, and the noise where it is an input, are constants in it, so that they are counted;
    they are as large. Measured channels are not discarded yet.

    Args:
        condition: tensors of the shapes that the text encoders give; a short prompt's by default, cut to
            --text-tokens.

    Raises:
        InputError: no model can be made of a config.
    """
    options = plan.options
    mode: Literal["bake", "live"] = "live" if options.conditioning == "live" else "bake"
    constant = replace(options, conditioning=mode, noise="baked")
    shapes = model_shapes(plan.family.transformer_class, plan.family.config)
    source = _Source(
        lambda: MetaWeights(shapes),
        lambda: shape_model(plan.latents.name, plan.latents.config()).eval().requires_grad_(False),
        lambda: torch.device("meta"),
    )
    if condition is None:
        condition = example_condition(plan.family, usual_text_tokens(plan.family, options.text_tokens))
    entry = replace(plan.entries[0], condition={name: one.to("meta") for name, one in condition.items()})
    made = _assemble(
        replace(plan, options=constant),
        source,
        [entry],
        torch.empty(plan.noise_shape, device="meta"),
        FeatureSettings(plan.discard or (), options.discard_stage, options.adaln),
        None if options.pca is None else torch.empty((options.pca, plan.family.channels), device="meta"),
    )
    feeds = [{name: feed.to("meta") for name, feed in one.items()} for one in made.feeds]
    return replace(made, graph=made.graph.to("meta"), feeds=feeds)


def _assemble(
    plan: Plan,
    source: _Source,
    entries: Sequence[Entry],
    noise: torch.Tensor,
    settings: FeatureSettings,
    projection: torch.Tensor | None,
) -> AssembledGraph:
    mode = plan.options.conditioning
    live = mode == "live"
    text_tokens = plan.family.text_length(entries[0].condition)
    spec = TrunkSpec(plan.layer, plan.size, plan.grid, text_tokens, plan.precision)
    conditioner_weights, trunk_weights = source.weights(), source.weights()
    with source.device():
        conditioner = plan.family.conditioner(
            conditioner_weights, spec if live else replace(spec, precision=FLOAT32)
        ).eval()
        if len(entries) > 1 and not live:
            hold_projections(conditioner)
        given = [] if live else [_run_conditioner(conditioner, entry) for entry in entries]
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
        _image_encoder(plan, source),
        condition,
        trunk,
        noise,
        baked_noise,
        settings,
        plan.grid,
        plan.output_dtype,
        projection,
    )
    if not baked_noise:
        feeds = [{NOISE: noise, **feed} for feed in feeds]
    return AssembledGraph(
        graph.eval(),
        [{name: feed[name] for name in graph.inputs} for feed in feeds],
        condition.inputs,
        trunk_weights.read,
        conditioner_weights.read,
    )


def _run_conditioner(conditioner: Conditioner, entry: Entry) -> Feeds:
    made: Feeds = conditioner(torch.tensor([entry.timestep]), entry.condition)
    return made


def _stored(row: Feeds, precision: Precision) -> Feeds:
    """A row of the bank as it is kept: keys and values in the graph's precision, what adds up in float32."""
    dtype = precision.compute
    if dtype == torch.bfloat16 or any(row[name].abs().max() > LIMIT for name in _COMPUTED & row.keys()):
        dtype = torch.float32  # numpy has no bfloat16; the attention casts
    return {name: tensor.to(dtype) if name in _COMPUTED else tensor for name, tensor in row.items()}


def _image_encoder(plan: Plan, source: _Source) -> nn.Module:
    """Pixels to x_0: the VAE's encoder, or nothing for a model that works in pixels."""
    latents = plan.latents
    if not latents.vae:
        return PixelEncoder()
    vae = source.vae()
    if latents.name == TINY:
        return TinyEncoder(vae, latents.shift, latents.scale, plan.precision)
    return KLEncoder(vae, *latents.shift_and_scale(vae), plan.precision, latents.patch)
