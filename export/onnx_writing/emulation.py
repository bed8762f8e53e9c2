"""Runs a graph in PyTorch, in its own precision, before it is traced, and checks what it gives.

ONNX Runtime computes most of a float16 graph in float32 on a CPU, which hides overflow; PyTorch does not. The
result is how much this model is rounded in this precision, and `ditf check` derives its gates from it. The
manifest calls it the rehearsal.

Products are accumulated in float32 and rounded to float16 once, as GPUs do. This is also fast enough: most
CPUs have no float16 arithmetic, and PyTorch's emulation of it is 40 to 200 times slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ditf.calib.parity import CEILINGS, TOLERANCES, feature_parity, gates, worst
from ditf.export.assemble.sensitivity import float32_limit, rounding_limit
from ditf.export.checkpoints.weight_spill import resting
from ditf.export.graph.features import FeaturesGraph
from ditf.runtime.errors import GateFailed

_SHORT = {torch.float16, torch.bfloat16}

_EXACT_BYTES = 1 << 20  # of the rows that `exact_features` keeps

_CHANNEL = 8
"""Limit of a channel's error over the relative error: some channels are a few times as large as others."""


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


class Float32Arithmetic(TorchFunctionMode):
    """Computes everything that is 16-bit in float32, so that only the graph's weights are rounded."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def wide(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(torch.float32) if value.dtype in _SHORT else value
            return torch.float32 if isinstance(value, torch.dtype) and value in _SHORT else value

        return func(*tree_map(wide, args), **tree_map(wide, dict(kwargs or {})))


@dataclass(frozen=True)
class ExactFeatures:
    """Features of a 16-bit graph in float32 arithmetic: what the written file gives apart from rounding.

    Attributes:
        rows: float32 [R, C], at the first golden rows of the first image under the first condition.
        limit: the largest relative error that float32 rounding explains.
    """

    rows: np.ndarray
    limit: float


@torch.no_grad()
def exact_features(
    graph: FeaturesGraph, feeds: Mapping[str, torch.Tensor], golden: Mapping[str, np.ndarray]
) -> ExactFeatures:
    """Run a 16-bit graph in float32 arithmetic on the first golden image.

    Args:
        graph: the module that will be traced.
        feeds: what it takes beside the image, under the first condition.
        golden: the arrays of golden.npz.
    """
    image = torch.from_numpy(golden["images"][:1])

    def run() -> torch.Tensor:
        with resting(), Float32Arithmetic():
            features: torch.Tensor = graph(image, *feeds.values())[0]
        return features

    features = run()
    tokens = features.flatten(1).T
    count = max(1, _EXACT_BYTES // (4 * tokens.shape[1]))
    rows = tokens[torch.from_numpy(golden["rows"][0][:count])].numpy()
    return ExactFeatures(rows, rounding_limit(graph, run, features))


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

    def run(index: int) -> torch.Tensor:
        with resting(), Float32Accumulation():
            features: torch.Tensor = graph(image, *feeds[index].values())
        return features

    measured = []
    for index, (rows, expected) in cases.items():
        tokens = run(index)[0].flatten(1).T
        measured.append(feature_parity(tokens[torch.from_numpy(rows)].numpy(), expected))
    metrics = worst(measured)
    limits = {**TOLERANCES[precision], **CEILINGS[precision]}
    if precision == "float32" and graph.output == torch.float32:
        limits["relative_error"] = float32_limit(graph, lambda: run(0), metrics["relative_error"])
        limits["channel_error"] = _CHANNEL * limits["relative_error"]
        limits["scale_error"] = limits["relative_error"]
    for gate in gates(metrics, limits):
        if not gate.ok:
            raise GateFailed(
                f"the {precision} graph does not match the model: {gate.name} {gate.value:.6g},"
                f" limit {gate.limit:g}",
                _fix(
                    precision,
                    "ditf reads it otherwise than diffusers: please report it with the model's name",
                ),
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
        raise GateFailed(
            f"the {precision} graph gives features that are not finite",
            _fix(precision, "look at the checkpoint's weights and the embeddings of --prompt-embeds"),
        )


def _fix(precision: str, otherwise: str) -> str:
    """What may help: float32, or `otherwise` where the graph is float32."""
    return otherwise if precision == "float32" else "export with --precision fp32"
