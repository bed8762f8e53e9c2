"""How many parameters a graph would hold, from a transformer's config alone: no weights are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditf.export.families.base import Condition, Family, TrunkSpec
from ditf.export.graph.precision import FLOAT32
from ditf.export.pretrained import model_shapes
from ditf.export.weights import MetaWeights


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
    shapes = model_shapes(family.transformer_class, family.config)
    weights = MetaWeights(shapes)
    spec = TrunkSpec(layer, size, grid, family.text_length(condition), FLOAT32)
    conditioner = family.conditioner(weights, layer, size, FLOAT32).to("meta")
    given = conditioner(torch.zeros(1, device="meta"), _meta(condition))
    live = family.trunk(weights, spec, None)
    bake = family.trunk(weights, spec, given)
    return ParameterCounts(
        whole=sum(map(math.prod, shapes.values())),
        live=_parameters(conditioner) + _parameters(live),
        bake=_parameters(bake),
    )


def _meta(condition: Condition) -> Mapping[str, Any]:
    return {name: tensor.to("meta") for name, tensor in condition.items()}


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
