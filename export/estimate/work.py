"""The products of a bundle's graphs: FLOPs and bytes by part, counted on shapes.

The convention of FLOPs is that of `ditf.export.estimate.op_counter`.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import nn

from ditf.export.estimate.op_counter import OpCount, Product, count_operations
from ditf.export.graph.blocks.layers import Linear
from ditf.export.graph.match import MatchGraph
from ditf.export.planning.plan import Plan
from ditf.runtime.backends.engine_records import MATCH_PLAN_POINTS

VAE, CONDITIONING, EMBEDDERS = "VAE encoder", "conditioning", "embedders"
GEMMS, ATTENTION, TAIL, MATCHING = "GEMMs of the blocks", "attention", "tail", "matching"
PARTS = (VAE, CONDITIONING, EMBEDDERS, GEMMS, ATTENTION, TAIL)
"""The parts of features.onnx. The tail (ensemble mean, discard and norm) has no products."""

MATCH_POINTS = 64
MATCH_IMAGE = (480, 640)
"""What matching is counted for, as `ditf bench` times it: a number of points, in an image [H, W]."""


@dataclass(frozen=True)
class Work:
    """The products of one part that have operands of one type.

    Attributes:
        kind: type of the operands: "float32", "float16", "bfloat16" or "int8".
        each: (FLOPs, bytes moved) of every product.
    """

    part: str
    kind: str
    each: tuple[tuple[int, int], ...]

    @property
    def operations(self) -> int:
        """FLOPs of all products."""
        return sum(operations for operations, _ in self.each)

    @property
    def moved(self) -> int:
        """Bytes that all products move."""
        return sum(moved for _, moved in self.each)


def work_of(products: Iterable[Product], quantised: AbstractSet[nn.Module]) -> list[Work]:
    """The products of features.onnx by part and type.

    Args:
        quantised: linears that int8 quantises.
    """
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for product in products:
        part, kind, moved = _part(product), product.kind, product.moved
        if product.module in quantised:
            kind = "int8"
            moved //= 2
        found.setdefault((part, kind), []).append((product.operations, moved))
    return [Work(part, kind, tuple(each)) for (part, kind), each in found.items()]


def _part(product: Product) -> str:
    prefixes = {"encoder": VAE, "condition": CONDITIONING, "trunk.embedder": EMBEDDERS}
    for prefix, part in prefixes.items():
        if f"{product.path}.".startswith(f"{prefix}."):
            return part
    # A linear is a linear, whichever operator a matrix product of its shape becomes.
    return ATTENTION if product.batched and not isinstance(product.module, Linear) else GEMMS


def tail_work(plan: Plan, batch: int, feature_bytes: int) -> Work:
    """The tail reads the hidden states of every noise, in float32, and writes the features."""
    hidden_states = 4 * batch * plan.options.ensemble * plan.grid[0] * plan.grid[1] * plan.family.channels
    return Work(TAIL, "float32", ((0, hidden_states + feature_bytes),))


def count_matching(plan: Plan) -> OpCount:
    """What match.onnx computes for as many points as an engine takes at once."""
    features = (1, plan.channels, *plan.grid)
    (h, w), (height, width), points = plan.grid, MATCH_IMAGE, MATCH_PLAN_POINTS[-1]
    given = [torch.empty(features, dtype=plan.output_dtype, device="meta") for _ in range(2)]
    shapes = ((points, h), (points, w), (height, h), (width, w))
    return count_operations(MatchGraph(), *given, *(torch.empty(shape, device="meta") for shape in shapes))


def matching_work(counted: OpCount) -> Work:
    """The products of matching `MATCH_POINTS` points, from `count_matching`."""
    each = tuple((product.operations, product.moved) for product in counted.products)
    return Work(MATCHING, "float32", each * -(-MATCH_POINTS // MATCH_PLAN_POINTS[-1]))
