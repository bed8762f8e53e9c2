"""What an export would cost on a device and on disk, counted from configs: no weight is read.

The graph that `ditf.export.exporter` would trace is built on the meta device and run once by
`ditf.export.estimate.op_counter`, whose convention its FLOPs have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ditf.export.assemble.features_graph import image_encoder
from ditf.export.assemble.parameter_counts import parameter_parts
from ditf.export.checkpoints.loading import model_shapes, shape_model
from ditf.export.checkpoints.noise_schedule import NoiseLevel
from ditf.export.estimate.devices import Device
from ditf.export.estimate.op_counter import Product, keep_ledger
from ditf.export.estimate.parameter_shapes import shape_modules, whole_parameters
from ditf.export.estimate.published_configs import example_condition, prompt_tokens
from ditf.export.families.base import Condition, TrunkSpec
from ditf.export.graph.blocks.dit import FoldedCrossAttention
from ditf.export.graph.blocks.layers import Linear
from ditf.export.graph.condition import BakedCondition, LiveCondition
from ditf.export.graph.features import FeatureSettings, FeaturesGraph
from ditf.export.graph.match import MatchGraph
from ditf.export.graph.precision import FLOAT32
from ditf.export.planning.plan import Plan
from ditf.runtime.backends.engine_records import MATCH_PLAN_POINTS

VAE, CONDITIONING, EMBEDDERS = "VAE encoder", "conditioning", "embedders"
GEMMS, ATTENTION, TAIL, MATCHING = "GEMMs of the blocks", "attention", "tail", "matching"
PARTS = (VAE, CONDITIONING, EMBEDDERS, GEMMS, ATTENTION, TAIL)
"""Of features.onnx. The tail, ensemble mean, discard and norm, has no products."""

MATCH_POINTS = 64
MATCH_IMAGE = (480, 640)
"""What matching is counted for, as `ditf bench` times it: points in an image [H, W]."""

_OTHER_FILES = 16 << 20
"""Of a bundle beside its weights: golden.npz (8 MB at the most), trace.npz, the graphs, calibration.json."""


@dataclass(frozen=True)
class Work:
    """Products of one part, of one kind.

    Attributes:
        kind: type of the operands: "float32", "float16", "bfloat16" or "int8".
        operations: FLOPs; moved: bytes.
        each: (operations, bytes) of every product.
    """

    part: str
    kind: str
    each: tuple[tuple[int, int], ...]

    @property
    def operations(self) -> int:
        return sum(operations for operations, _ in self.each)

    @property
    def moved(self) -> int:
        return sum(moved for _, moved in self.each)


@dataclass(frozen=True)
class Cost:
    """What one call of a bundle's graphs costs.

    Attributes:
        whole: parameters of the unmodified transformer.
        parameters: of features.onnx.
        weight_bytes: of features.onnx.
        work: products of features.onnx, and of matching `MATCH_POINTS` points.
        activation_bytes: the most that live at once if every operator runs by itself and frees what nobody
            reads any more.
        feature_bytes: of one call's features.
        reference_bytes: of the unmodified transformer and VAE in float32, which an export compares with.
        block_bytes: of the transformer's largest block in float32.
    """

    whole: int
    parameters: int
    weight_bytes: int
    work: tuple[Work, ...]
    activation_bytes: int
    feature_bytes: int
    reference_bytes: int
    block_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Weights, activations and two feature maps: what a device needs beside its operating system."""
        return self.weight_bytes + self.activation_bytes + 2 * self.feature_bytes

    @property
    def bundle_bytes(self) -> int:
        return self.weight_bytes + _OTHER_FILES

    def operations(self, *parts: str) -> int:
        """FLOPs of some parts; of features.onnx by default."""
        return sum(work.operations for work in self.work if work.part in (parts or PARTS))

    def seconds(self, device: Device, *parts: str) -> float:
        """Roofline of some parts, product by product; of features.onnx by default.

        Raises:
            InputError: the device has no published rate for this precision.
        """
        return sum(
            device.seconds(work.kind, operations, moved)
            for work in self.work
            if work.part in (parts or PARTS)
            for operations, moved in work.each
        )


@torch.no_grad()
def count_cost(plan: Plan, condition: Condition | None = None) -> Cost:
    """Count what a plan's export will cost to run; with `--batch dynamic` for a batch of one.

    Args:
        condition: of the shapes that the text encoders give; a published model's by default.
    """
    graph, feeds = shape_graph(plan, condition)
    batch = 1 if plan.options.batch == "dynamic" else plan.options.batch
    image = torch.empty((batch, *plan.size, 3), dtype=torch.uint8, device="meta")
    ledger = keep_ledger(graph, image, *feeds)
    quantised = set(_quantised(graph)) if plan.options.precision == "int8" else set()
    tokens = batch * plan.grid[0] * plan.grid[1] * plan.family.channels
    feature_bytes = tokens * plan.output_dtype.itemsize
    tail = Work(TAIL, "float32", ((0, 4 * tokens * plan.options.ensemble + feature_bytes),))
    matching, match_peak = _matching(plan)
    reference, block = _reference_bytes(plan)
    return Cost(
        whole=whole_parameters(plan.family),
        parameters=sum(parameter.numel() for parameter in graph.parameters()),
        weight_bytes=_weight_bytes(graph, quantised),
        work=(*_collect(ledger.products, quantised), tail, matching),
        activation_bytes=max(ledger.peak_bytes(), match_peak),
        feature_bytes=feature_bytes,
        reference_bytes=reference,
        block_bytes=block,
    )


@torch.no_grad()
def bundle_bytes(plan: Plan) -> int:
    """About how large the bundle of a plan will be."""
    graph, _ = shape_graph(plan)
    quantised = set(_quantised(graph)) if plan.options.precision == "int8" else set()
    return _weight_bytes(graph, quantised) + _OTHER_FILES


@torch.no_grad()
def written_bytes(plan: Plan, bundle: int) -> int:
    """What an export has on disk at most: the bundle and its weights once more while they are traced, or,
    before there is a bundle, the weights in float32, whose values are measured.

    Args:
        bundle: from `bundle_bytes`.
    """
    at_once = 2 * bundle - _OTHER_FILES
    if len(plan.entries) > 1 and plan.options.conditioning == "bank":
        at_once += _conditioner_bytes(plan)
    if plan.options.precision != "float32" and plan.options.calibration is None:
        graph, _ = shape_graph(replace(plan, precision=FLOAT32))
        at_once = max(at_once, _weight_bytes(graph, set()))
    return at_once


def _conditioner_bytes(plan: Plan) -> int:
    """In float32: it is kept on disk while the rows of a bank are computed."""
    example = example_condition(plan.family, prompt_tokens(plan.family, None))
    spec = TrunkSpec(plan.layer, plan.size, plan.grid, plan.family.text_length(example), FLOAT32)
    conditioner, _ = shape_modules(plan.family, spec, example, live=True)
    return sum(4 * parameter.numel() for parameter in conditioner.parameters())


def shape_graph(plan: Plan, condition: Condition | None = None) -> tuple[FeaturesGraph, list[torch.Tensor]]:
    """The features graph of a plan on the meta device, and what it is fed beside the image.

    A bank's rows are counted as constants: they are as large.

    Args:
        condition: as for `count_cost`.
    """
    family, live = plan.family, plan.options.conditioning == "live"
    example = condition or example_condition(family, prompt_tokens(family, plan.options.text_tokens))
    spec = TrunkSpec(plan.layer, plan.size, plan.grid, family.text_length(example), plan.precision)
    conditioner, trunk = shape_modules(family, spec, example, live)
    height, width = (length // plan.latents.stride for length in plan.size)
    shape = (plan.options.ensemble, plan.latents.channels, height, width)
    graph = FeaturesGraph(
        image_encoder(plan, _vae(plan) if plan.latents.vae else None),
        LiveCondition(conditioner, plan.levels.float()) if live else BakedCondition(NoiseLevel(1.0, 1.0)),
        trunk,
        torch.empty(shape, device="meta"),
        True,
        FeatureSettings(channels=plan.discard or (), adaln=plan.options.adaln),
        plan.grid,
        plan.output_dtype,
    )
    named = {**example, "timestep": torch.zeros(1, dtype=torch.int64)}
    return graph.to("meta").eval(), [named[name].to("meta") for name in graph.inputs]


def _vae(plan: Plan) -> Any:
    return shape_model(plan.latents.name, plan.latents.config()).eval().requires_grad_(False)


def _reference_bytes(plan: Plan) -> tuple[int, int]:
    """The unmodified transformer and VAE, and the transformer's largest block, in float32."""
    shapes = model_shapes(plan.family.transformer_class, plan.family.config)
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    vae = sum(4 * parameter.numel() for parameter in _vae(plan).parameters()) if plan.latents.vae else 0
    prefixes = (f"{plan.family.block_name(index)}." for index in range(plan.family.blocks.count))
    blocks = (sum(size for name, size in sizes.items() if name.startswith(p)) for p in prefixes)
    return sum(sizes.values()) + vae, max(blocks)


def _quantised(graph: FeaturesGraph) -> Iterable[nn.Module]:
    """The linears that an int8 export quantises if its calibration keeps none of them in float32."""
    kept = tuple(f"{n}." for n, m in graph.trunk.named_modules() if isinstance(m, FoldedCrossAttention))
    for name, module in graph.trunk.named_modules():
        if isinstance(module, Linear) and module.weight.dtype == torch.float16 and not name.startswith(kept):
            yield module


def _weight_bytes(graph: FeaturesGraph, quantised: set[nn.Module]) -> int:
    """As the manifest counts them."""
    counted = sum(one["bytes"] for part in parameter_parts(graph).values() for one in part.values())
    saved = sum(m.weight.numel() for m in quantised if isinstance(m, Linear))
    return counted - saved


def _matching(plan: Plan) -> tuple[Work, int]:
    """match.onnx for `MATCH_POINTS` points, as many at a time as an engine takes; its peak in bytes."""
    features = (1, plan.family.channels, *plan.grid)
    (h, w), (height, width), points = plan.grid, MATCH_IMAGE, MATCH_PLAN_POINTS[-1]
    given = [torch.empty(features, dtype=plan.output_dtype, device="meta") for _ in range(2)]
    shapes = ((points, h), (points, w), (height, h), (width, w))
    ledger = keep_ledger(MatchGraph(), *given, *(torch.empty(shape, device="meta") for shape in shapes))
    each = tuple((product.operations, product.moved) for product in ledger.products)
    return Work(MATCHING, "float32", each * -(-MATCH_POINTS // points)), ledger.peak_bytes()


def _collect(products: Iterable[Product], quantised: set[nn.Module]) -> list[Work]:
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
