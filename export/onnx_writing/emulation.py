"""Runs a graph in PyTorch, in its own precision, before it is traced, and checks what it gives.

ONNX Runtime computes most of a float16 graph in float32 on a CPU, which hides overflow; PyTorch does not. The
result is how much this model is rounded in this precision, and `ditf check` derives its gates from it. The
manifest calls it the rehearsal.

Products are accumulated in float32 and rounded to float16 once, as GPUs do. This is also fast enough: most
CPUs have no float16 arithmetic, and PyTorch's emulation of it is 40 to 200 times slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ditf.calib.parity import CEILINGS, TOLERANCES, feature_parity, gates, worst
from ditf.export.checkpoints.weight_spill import resting
from ditf.export.graph.features import FeaturesGraph
from ditf.runtime.errors import GateFailed

_SHORT = {torch.float16, torch.bfloat16}


class Float32Accumulation(TorchDispatchMode):
    """Computes matrix products and convolutions of 16-bit tensors in float32, and rounds the result once."""

    _PRODUCTS = frozenset(
        {
            torch.ops.aten.mm.default,
            torch.ops.aten.bmm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.baddbmm.default,
            torch.ops.aten.convolution.default,
        }
    )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        types_given = {arg.dtype for arg in args if isinstance(arg, torch.Tensor)} & _SHORT
        if func not in self._PRODUCTS or not types_given:
            return func(*args, **kwargs)
        wide = (arg.to(torch.float32) if isinstance(arg, torch.Tensor) else arg for arg in args)
        return func(*wide, **kwargs).to(types_given.pop())


@torch.no_grad()
def check_against_golden(
    graph: FeaturesGraph,
    feeds: Sequence[Mapping[str, torch.Tensor]],
    golden: Mapping[str, np.ndarray],
    precision: str,
) -> dict[str, float]:
    """Compare the graph's features on the first golden image with the unmodified model's.

    Args:
        graph: the module that will be traced.
        feeds: for each condition, what the graph takes beside the image.
        golden: the arrays of golden.npz.
        precision: the name of the graph's precision.

    Returns:
        The metrics of `feature_parity`, each the worst over the conditions that golden.npz has.

    Raises:
        GateFailed: the features differ by more than this precision explains.
    """
    image = torch.from_numpy(golden["images"][:1])
    cases = {0: (golden["rows"][0], golden["features"][0])}
    for index in range(1, len(feeds)):
        if f"rows_{index}" in golden:
            cases[index] = (golden[f"rows_{index}"], golden[f"features_{index}"])
    measured = []
    for index, (rows, expected) in cases.items():
        with resting(), Float32Accumulation():
            tokens = graph(image, *feeds[index].values())[0].flatten(1).T
        measured.append(feature_parity(tokens[torch.from_numpy(rows)].numpy(), expected))
    metrics = worst(measured)
    limits = {**TOLERANCES[precision], **CEILINGS[precision]}
    for gate in gates(metrics, limits):
        if not gate.ok:
            raise GateFailed(
                f"the {precision} graph does not match the model: {gate.name} {gate.value:.6g},"
                f" limit {gate.limit:g}",
                _fix(precision),
            )
    return metrics


@torch.no_grad()
def check_finite(
    graph: FeaturesGraph, feeds: Mapping[str, torch.Tensor], image: np.ndarray, precision: str
) -> None:
    """Check that the graph's features are finite, where there is nothing to compare them with.

    Args:
        graph, precision: as for `check_against_golden`; feeds: of one condition.
        image: uint8 [H, W, 3].

    Raises:
        GateFailed: a feature is NaN or infinite.
    """
    with resting(), Float32Accumulation():
        features = graph(torch.from_numpy(image)[None], *feeds.values())
    if not torch.isfinite(features).all():
        raise GateFailed(f"the {precision} graph gives features that are not finite", _fix(precision))


def _fix(precision: str) -> str:
    if precision != "float32":
        return "export with --precision fp32"
    return "look at the checkpoint's weights and the embeddings of --prompt-embeds"
