"""Measures the largest value of everything that a 16-bit graph would hold, on the same graph in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ditf.calib.parity import feature_parity
from ditf.calib.recipe import FEATURES, VAE_INNER, VAE_LOGITS, VAE_RESIDUAL, Extent
from ditf.export.assemble.features_graph import Feeds, assemble
from ditf.export.assemble.sensitivity import float32_limit
from ditf.export.checkpoints.weight_spill import resting
from ditf.export.graph.blocks.layers import Linear
from ditf.export.graph.features import FeatureSettings, FeaturesGraph
from ditf.export.graph.precision import MEASURING
from ditf.export.graph.range_probes import Where, branch_of, recording
from ditf.export.graph.vae_encoders import (
    KLEncoder,
    TinyEncoder,
    attentions,
    residual_writers,
    tiny_blocks,
    tiny_convolutions,
)
from ditf.export.measure.golden import golden_cases
from ditf.export.planning.conditions import Entry
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import GateFailed


@torch.no_grad()
def measure_ranges(
    plan: Plan,
    entries: Sequence[Entry],
    noise: torch.Tensor,
    images: Sequence[np.ndarray],
    hidden_states: np.ndarray,
    settings: FeatureSettings,
) -> tuple[list[Extent], dict[str, torch.Tensor]]:
    """Run the graph of a plan in float32 over images; the first image runs under all golden conditions.

    Gates stay explicit factors, so that the output of a linear is seen with and without its gate.

    Args:
        entries: encoded and trimmed.
        images: uint8 [H, W, 3] at the plan's size.
        hidden_states: what entered block k of the unmodified model on the first image under the first
            condition, float32 [N, C]. It shows that the measured graph is the model.
        settings: the feature that ships.

    Returns:
        The extents, among them the feature's, whose name is `settings.name`; and the largest |x| of every
        input channel [C_in] of the trunk's linears, by path.

    Raises:
        GateFailed: the graph's hidden states are not the model's.
    """
    seen = _Largest(plan.grid[0] * plan.grid[1])
    with recording(seen.record):  # what is constant is computed now
        made = assemble(replace(plan, precision=MEASURING), entries, noise, settings)
    maxima: dict[str, torch.Tensor] = {}
    watched = _watching(made.graph.encoder, seen), _watching_inputs(made.graph.trunk, maxima)
    with recording(seen.record), watched[0], watched[1], resting():
        for number, image in enumerate(images):
            for index in golden_cases(len(made.feeds)) if number == 0 else (0,):
                feeds = made.feeds[index]
                pixels = torch.from_numpy(image.copy())[None]
                z, given = made.graph.hidden_states(pixels, *feeds.values())
                if number == index == 0:
                    _compare(made.graph, pixels, feeds, z, hidden_states)
                seen.add(settings.name, FEATURES, "image", made.graph.features(z, given))
    return seen.extents(), maxima


def _compare(
    graph: FeaturesGraph, pixels: torch.Tensor, feeds: Feeds, z: torch.Tensor, expected: np.ndarray
) -> None:
    """Raise GateFailed if the graph's hidden states z [1, N, C] are not the model's, up to rounding."""
    error = feature_parity(z[0].numpy(), expected)["relative_error"]
    limit = float32_limit(graph, lambda: graph.hidden_states(pixels, *feeds.values())[0], error)
    if not error <= limit:
        raise GateFailed(
            f"the graph's hidden states differ from the unmodified model's: relative error {error:.3g}, limit"
            f" {limit:.2g}",
            "this is a defect of ditf",
        )


class _Largest:
    """Keeps the largest |x| of every value, by the module that computes it; image and text apart.

    Args:
        tokens: N, the number of the image's tokens.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._found: dict[tuple[str, str, str], float] = {}
        self._weights: dict[int, torch.Tensor] = {}  # held, so that none takes the id of another

    def record(self, where: Where, kind: str, tensor: torch.Tensor) -> None:
        """Note the value of a range probe."""
        if kind.endswith("weight"):
            if id(tensor) not in self._weights:
                self._weights[id(tensor)] = tensor
                self.add(where.name, kind, where.stream, tensor)
            return
        text = tensor.shape[-2] - self._tokens if tensor.ndim > 2 and where.stream == "image" else 0
        if text > 0:  # one sequence, text first
            self.add(where.name, kind, "text", tensor[..., :text, :])
            tensor = tensor[..., text:, :]
        self.add(where.name, kind, where.stream, tensor)

    def add(self, name: str, kind: str, stream: str, tensor: torch.Tensor) -> None:
        low, high = torch.aminmax(tensor)
        largest = max(-float(low), float(high))  # NaN stays NaN: the comparisons below keep it
        key = (name, kind, stream)
        before = self._found.get(key, 0.0)
        self._found[key] = largest if not largest <= before else before

    def extents(self) -> list[Extent]:
        """The extents, in the order in which the values were first computed."""
        return [
            Extent(name, branch_of(name), kind, stream, value)
            for (name, kind, stream), value in self._found.items()
        ]


@contextmanager
def _watching(encoder: nn.Module, seen: _Largest) -> Iterator[None]:
    """Set hooks on the layers of a VAE encoder; an encoder of pixels has none."""
    handles = []

    def watch(module: nn.Module, name: str, kind: str) -> None:
        handles.append(
            module.register_forward_hook(
                lambda module, args, output: seen.add(f"vae.{name}", kind, "image", output)
            )
        )

    if isinstance(encoder, KLEncoder):
        for name, layer, _ in residual_writers(encoder.encoder):
            watch(layer, name, VAE_RESIDUAL)
            watch(encoder.encoder.get_submodule(_owner(name)), _owner(name), VAE_RESIDUAL)
        for name, module in encoder.encoder.named_modules():
            if name.endswith(".conv1"):
                watch(module, name, VAE_INNER)
        for name, attention in attentions(encoder.encoder):
            handles += _watch_logits(attention, f"vae.{name}", seen)
    if isinstance(encoder, TinyEncoder):
        for name, layer in (*tiny_convolutions(encoder.layers).items(), *tiny_blocks(encoder.layers)):
            watch(layer, f"layers.{name}", VAE_RESIDUAL)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watching_inputs(trunk: nn.Module, maxima: dict[str, torch.Tensor]) -> Iterator[None]:
    """Set hooks on the linears of a trunk that keep the maxima of their input channels."""

    def keep(name: str, x: torch.Tensor) -> None:
        largest = x.abs().flatten(0, -2).amax(dim=0)
        maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: keep(name, args[0]))
        for name, module in trunk.named_modules()
        if isinstance(module, Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _owner(name: str) -> str:
    """The block whose output is the residual after a layer, or the layer itself where it is in no block."""
    for suffix in (".conv2", ".conv_shortcut", ".to_out.0"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _watch_logits(attention: nn.Module, name: str, seen: _Largest) -> list[torch.utils.hooks.RemovableHandle]:
    """Set hooks on query, key and value. No hook sees the logits: |q . k| <= |q| |k| is kept."""
    norms: list[torch.Tensor] = []

    def query(module: nn.Module, args: object, output: torch.Tensor) -> None:
        norms[:] = [output.norm(dim=-1).amax()]
        seen.add(name, VAE_LOGITS, "image", output)

    def key(module: nn.Module, args: object, output: torch.Tensor) -> None:
        bound = norms[0] * output.norm(dim=-1).amax() * output.shape[-1] ** -0.5
        seen.add(name, VAE_LOGITS, "image", torch.stack([bound, output.abs().amax()]))

    def value(module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen.add(name, VAE_LOGITS, "image", output)

    parts = {"to_q": query, "to_k": key, "to_v": value}
    return [attention.get_submodule(part).register_forward_hook(hook) for part, hook in parts.items()]
