"""How many parameters a graph would hold, from a transformer's config alone: no weights are needed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ditf.export.checkpoints.loading import model_shapes
from ditf.export.checkpoints.weights import MetaWeights
from ditf.export.families.base import Condition, Family, TrunkSpec
from ditf.export.graph.blocks.trunk import Trunk
from ditf.export.graph.condition import Conditioner, hold_projections
from ditf.export.graph.precision import FLOAT32


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a transformer.

    Attributes:
        whole: of the model.
        live: of the graph cut at a layer, its modulation computed in it.
        bake: of the same graph with the condition folded in.
    """

    whole: int
    live: int
    bake: int


@torch.no_grad()
def count_parameters(
    family: Family, layer: int, size: tuple[int, int], grid: tuple[int, int], condition: Condition
) -> ParameterCounts:
    """Build the graph's modules on shapes alone and count what they hold.

    Args:
        family: made from a config.
        layer: k.
        size: (H, W) in pixels; grid: (h, w) in tokens.
        condition: tensors of the right shapes.
    """
    spec = TrunkSpec(layer, size, grid, family.text_length(condition), FLOAT32)
    conditioner, live = shape_modules(family, spec, condition, live=True)
    _, bake = shape_modules(family, spec, condition, live=False)
    return ParameterCounts(
        whole=whole_parameters(family),
        live=_parameters(conditioner) + _parameters(live),
        bake=_parameters(bake),
    )


def whole_parameters(family: Family) -> int:
    """Parameters of the unmodified transformer."""
    return sum(map(math.prod, model_shapes(family.transformer_class, family.config).values()))


@torch.no_grad()
def shape_modules(
    family: Family, spec: TrunkSpec, condition: Condition, live: bool
) -> tuple[Conditioner, Trunk]:
    """Conditioner and trunk of a graph on the meta device, from the config alone.

    Args:
        condition: tensors of the right shapes.
        live: the trunk takes what the conditioner makes at run time.
    """
    weights = MetaWeights(model_shapes(family.transformer_class, family.config))
    with torch.device("meta"):  # for what a conditioner keeps beside its parameters
        conditioner = family.conditioner(weights, spec if live else replace(spec, precision=FLOAT32))
        if live:
            hold_projections(conditioner)
        given = conditioner(torch.zeros(1), {name: t.to("meta") for name, t in condition.items()})
    trunk = family.trunk(weights, spec, None if live else given)
    return conditioner.to("meta"), trunk.to("meta")


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
