"""What an export needs of this machine, and what its bundle costs on a device: counted from configs.

The graph that the exporter would trace is assembled on the meta device and run there once: no weight is read.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

import torch

from ditf.calib.memory import available_bytes
from ditf.export.assemble.features_graph import assemble_shapes
from ditf.export.assemble.parameter_counts import parameter_parts
from ditf.export.checkpoints.loading import model_shapes, shape_model
from ditf.export.estimate import memory
from ditf.export.estimate.devices import Device
from ditf.export.estimate.op_counter import OpCount, count_operations
from ditf.export.estimate.work import PARTS, Work, count_matching, matching_work, tail_work, work_of
from ditf.export.families.base import Condition
from ditf.export.graph.blocks.layers import Linear
from ditf.export.graph.condition import LiveCondition
from ditf.export.graph.features import FeaturesGraph
from ditf.export.graph.precision import FLOAT32
from ditf.export.graph.quantised_linears import quantisable
from ditf.export.planning.plan import Plan

_OTHER_FILES = 16 << 20
"""Bytes of a bundle beside its weights: golden.npz (at most 8 MB), trace.npz, graphs, calibration.json."""


class Estimate:
    """Estimates for one plan. Each figure is computed when it is first asked for, and only once.

    The figures of the exporting machine read the checkpoint's files, so they are asked for while it is open;
    those of the device need the configs only while this is made. With `--batch dynamic` a call has a batch
    of one.

    Args:
        plan: as it was decided, before anything is measured.
        condition: tensors of the shapes that the text encoders give; a short prompt's by default.

    Attributes:
        graph: the features graph, without values.
        feeds: what the graph takes beside the image, without values.

    Raises:
        InputError: no model can be made of a config. So does a figure where the model does not run.
    """

    def __init__(self, plan: Plan, condition: Condition | None = None) -> None:
        self.plan = plan
        self._condition = condition
        self._vae_config = plan.latents.config() if plan.latents.vae else None
        made = assemble_shapes(plan, condition)
        self.graph = made.graph
        self.feeds = list(made.feeds[0].values())

    # On the device that runs the bundle.

    @cached_property
    def whole(self) -> int:
        """Parameters of the unmodified transformer."""
        return sum(self._transformer.values())

    @cached_property
    def parameters(self) -> int:
        """Parameters of features.onnx."""
        return sum(parameter.numel() for parameter in self.graph.parameters())

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights of features.onnx."""
        return _weight_bytes(self.graph) - sum(m.weight.numel() for m in self._quantised)

    @cached_property
    def work(self) -> tuple[Work, ...]:
        """The products of features.onnx, and those of matching `MATCH_POINTS` points."""
        products = work_of(self._counted.products, set(self._quantised))
        tail = tail_work(self.plan, self._batch, self.feature_bytes)
        return (*products, tail, matching_work(self._matching))

    @cached_property
    def activation_bytes(self) -> int:
        """The most bytes of activations that live at once on a device.

        Every operator is taken to run by itself, and to free what is not read any more.
        """
        return max(self._counted.peak_bytes(), self._matching.peak_bytes())

    @cached_property
    def feature_bytes(self) -> int:
        """Bytes of the features of one call."""
        tokens = self._batch * self.plan.grid[0] * self.plan.grid[1]
        return tokens * self.plan.channels * self.plan.output_dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        """What a device needs beside its operating system: weights, activations and two feature maps."""
        return self.weight_bytes + self.activation_bytes + 2 * self.feature_bytes

    def operations(self, *parts: str) -> int:
        """FLOPs of some parts; of features.onnx by default."""
        return sum(work.operations for work in self.work if work.part in (parts or PARTS))

    def seconds(self, device: Device, *parts: str) -> float:
        """The least time that some parts take on a device, product by product; features.onnx by default.

        Raises:
            InputError: the device has no published rate for this precision.
        """
        return sum(
            device.seconds(work.kind, operations, moved)
            for work in self.work
            if work.part in (parts or PARTS)
            for operations, moved in work.each
        )

    # On the machine that exports.

    @cached_property
    def bundle_bytes(self) -> int:
        """About how large the bundle will be on disk."""
        return self.weight_bytes + _OTHER_FILES

    @cached_property
    def written_bytes(self) -> int:
        """The most bytes that an export has on disk at once.

        That is the bundle and its weights once more, while they are traced; or, before there is a bundle, the
        weights in float32, whose values are measured.
        """
        options = self.plan.options
        at_once = self.bundle_bytes + self.weight_bytes
        if len(self.plan.entries) > 1 and options.conditioning == "bank":
            at_once += self._conditioner_bytes
        if options.precision != "float32" and options.calibration is None:
            at_once = max(at_once, _weight_bytes(self._float32))
        return at_once

    @cached_property
    def reference_bytes(self) -> int:
        """Bytes in float32 of the unmodified transformer and VAE, which an export compares with."""
        vae = 0
        if self._vae_config is not None:
            model = shape_model(self.plan.latents.name, self._vae_config)
            vae = sum(parameter.numel() for parameter in model.parameters())
        return 4 * (self.whole + vae)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes in float32 of the unmodified transformer's largest block."""
        family = self.plan.family
        prefixes = [f"{family.block_name(index)}." for index in range(family.blocks.count)]
        return 4 * max(
            sum(size for name, size in self._transformer.items() if name.startswith(prefix))
            for prefix in prefixes
        )

    @cached_property
    def stage_bytes(self) -> dict[str, int]:
        """Memory that each stage of the export needs beside the libraries: {stage: bytes}."""
        return memory.stage_bytes(self.plan, self._float32, self._activations)

    @cached_property
    def oracle_bytes(self) -> int:
        """Memory that the checkpoint's own pipeline needs, to make golden outputs with it."""
        return memory.oracle_bytes(self.plan, self._activations)

    def check_memory(self) -> None:
        """Reject an export that this machine has no memory for, before the work starts.

        Raises:
            InputError: names the stage, what it needs and what is available.
        """
        available = available_bytes()
        if available is not None:
            memory.check_stages(self.plan, self.stage_bytes, available)

    # What the figures are made of.

    @property
    def _batch(self) -> int:
        batch = self.plan.options.batch
        return 1 if batch == "dynamic" else batch

    @cached_property
    def _float32(self) -> FeaturesGraph:
        """The graph in float32: memory is estimated in it, whatever the precision."""
        if self.plan.precision == FLOAT32:
            return self.graph
        return assemble_shapes(replace(self.plan, precision=FLOAT32), self._condition).graph

    @cached_property
    def _activations(self) -> int:
        """The most bytes of activations that live at once for one image in float32."""
        image = torch.empty((1, *self.plan.size, 3), dtype=torch.uint8, device="meta")
        return count_operations(self._float32, image, *self.feeds).peak_bytes()

    @cached_property
    def _counted(self) -> OpCount:
        image = torch.empty((self._batch, *self.plan.size, 3), dtype=torch.uint8, device="meta")
        return count_operations(self.graph, image, *self.feeds)

    @cached_property
    def _matching(self) -> OpCount:
        return count_matching(self.plan)

    @cached_property
    def _quantised(self) -> list[Linear]:
        """The linears that int8 quantises if the calibration keeps none of them in float32."""
        if self.plan.options.precision != "int8":
            return []
        return [linear for _, linear in quantisable(self.graph.trunk)]

    @cached_property
    def _transformer(self) -> dict[str, int]:
        """Elements of the unmodified transformer's tensors."""
        shapes = model_shapes(self.plan.family.transformer_class, self.plan.family.config)
        return {name: math.prod(shape) for name, shape in shapes.items()}

    @property
    def _conditioner_bytes(self) -> int:
        """In float32: the conditioner is on disk while the rows of a bank are computed."""
        options = replace(self.plan.options, conditioning="live")
        live = assemble_shapes(replace(self.plan, options=options, precision=FLOAT32), self._condition)
        assert isinstance(live.graph.condition, LiveCondition)
        return 4 * sum(parameter.numel() for parameter in live.graph.condition.conditioner.parameters())


def _weight_bytes(graph: FeaturesGraph) -> int:
    """As the manifest counts them."""
    return sum(one["bytes"] for part in parameter_parts(graph).values() for one in part.values())
