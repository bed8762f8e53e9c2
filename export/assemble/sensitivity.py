"""How much of a difference between two float32 computations of a model its own rounding explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ditf.export.graph.features import FeaturesGraph

AGREEMENT = 2e-5
"""The largest relative error of a float32 graph that needs no explanation: ten times every family's."""

_PERTURBATION = 2.0**-20
"""Relative change of x_t, 16 roundings of float32."""

_MARGIN = 32
"""A model rounds some hundred times on the way; the errors add up like a random walk."""


def float32_limit(graph: FeaturesGraph, run: Callable[[], torch.Tensor], error: float) -> float:
    """The largest relative error of a float32 graph against the model that rounding explains.

    Attention with very large logits amplifies rounding by orders of magnitude. Only where the error exceeds
    `AGREEMENT` the amplification is measured: the graph runs again with x_t changed in its last bits.

    Args:
        graph: in float32.
        run: runs the graph and returns what was compared.
        error: the relative error of what `run` returns.
    """
    return AGREEMENT if error <= AGREEMENT else rounding_limit(graph, run, run())


def rounding_limit(graph: FeaturesGraph, run: Callable[[], torch.Tensor], before: torch.Tensor) -> float:
    """The largest relative difference that float32 rounding explains, measured; see `float32_limit`.

    Args:
        before: what `run` returned.
    """

    def perturb(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        signs = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).sign()
        return (args[0] * (1 + _PERTURBATION * signs), *args[1:])

    handle = graph.trunk.register_forward_pre_hook(perturb)
    try:
        change = float((run() - before).norm() / before.norm().clamp(min=1e-30))
    finally:
        handle.remove()
    return max(AGREEMENT, _MARGIN * change)
