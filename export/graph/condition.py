"""What reaches the trunk of the condition: constants, rows of a bank, or computed in the graph."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

from ditf.export.checkpoints.noise_schedule import NoiseLevel
from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.condition_tensors import MODULATION, ConditionTensors
from ditf.export.graph.blocks.layers import Linear, constant, read_linear
from ditf.export.graph.precision import Precision
from ditf.export.graph.range_probes import Where, probe

LEVEL = "level"
TIMESTEP = "timestep"

Levels = tuple[ConditionTensors, torch.Tensor | float, torch.Tensor | float]
"""What is given to the trunk, and signal and noise of x_t = signal * x_0 + noise * eps."""


class Conditioner(nn.Module, ABC):
    """A condition and a timestep -> what the trunk is given. Run once at export, or traced (`live`)."""

    inputs: tuple[str, ...]
    """Names of the condition's tensors that `forward` reads, beside the timestep."""

    @abstractmethod
    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Tensors by name, among them `modulation` [R, C] float32.

        Args:
            timestep: int64 [1].
            condition: as `Family.encode_conditions` makes them.
        """


class Frequencies(nn.Module):
    """diffusers' `Timesteps` with its frequencies as constants.

    In a graph they would be exp() of a range; where a runtime's exp differs in the last bit, a timestep
    or guidance in the thousands turns that into 1e-4 of the angle.

    Args:
        timesteps: the module whose place this takes.
        device: of the weights beside it.
    """

    def __init__(self, timesteps: Timesteps, device: torch.device) -> None:
        super().__init__()
        half = timesteps.num_channels // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        self.frequencies = constant(torch.exp(exponents / (half - timesteps.downscale_freq_shift)).to(device))
        self.scale = float(timesteps.scale)
        self.cosine_first = timesteps.flip_sin_to_cos

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, channels]."""
        angles = timesteps[:, None].to(torch.float32) * self.frequencies
        if self.scale != 1.0:
            angles = angles * self.scale
        waves = [torch.sin(angles), torch.cos(angles)]
        return torch.cat(waves[::-1] if self.cosine_first else waves, dim=-1)


def with_constant_frequencies(embedding: nn.Module) -> nn.Module:
    """Replace every `Timesteps` in an embedding by `Frequencies`, in place."""
    device = next(embedding.parameters()).device
    for module in list(embedding.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Timesteps):
                setattr(module, name, Frequencies(child, device))
    return embedding


class LinearRows(Sequence[tuple[torch.Tensor, torch.Tensor | None]]):
    """The first outputs of linear layers of a checkpoint, each read anew whenever it is asked for.

    Args:
        parts: name of each linear, and how many of its outputs are used.
    """

    def __init__(self, weights: Weights, parts: Sequence[tuple[str, int]]) -> None:
        self._weights = weights
        self._parts = list(parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        """Weight [out, in] and bias of one."""
        name, rows = self._parts[index]
        weight, bias = read_linear(self._weights, name)
        return weight[:rows], None if bias is None else bias[:rows]


class ModulationProjection(nn.Module):
    """silu(x) W + b -> modulation rows [R, C], float32; the AdaLN linears of all blocks.

    They are a third of FLUX.1's parameters, and of a condition that is baked in nothing but their product is
    needed: each is read, multiplied and forgotten. `hold` makes them parameters, for a graph that has them or
    for several conditions.

    Args:
        linears: weight [n C, D] and bias of each AdaLN linear, in the order of the rows.
        precision: of the graph that holds them.
        channels: C, where it is not D, the width of the condition.
        activated: False where x itself is read, without the silu.
    """

    def __init__(
        self,
        linears: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        precision: Precision,
        channels: int | None = None,
        activated: bool = True,
    ) -> None:
        super().__init__()
        self.activated = activated
        self.channels = channels or linears[0][0].shape[1]
        self.dtype = precision.of(MODULATION)
        self.where = Where(MODULATION, "condition")
        self.linears = linears
        self.held = nn.ModuleList()

    def hold(self) -> None:
        """Make the linears parameters of this module."""
        if not self.held:
            for weight, bias in self.linears:
                self.held.append(Linear(weight, bias, self.dtype, self.where))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """[1, D] -> [R, C]."""
        x = nn.functional.silu(embedding) if self.activated else embedding
        packed = torch.cat([linear(x)[0] for linear in self.held]) if self.held else self._multiplied(x)
        return packed.unflatten(0, (-1, self.channels)).to(torch.float32)

    def _multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """The same product [R C], bit for bit, without holding any."""
        probe(self.where, "input", x)
        parts, extremes, biases = [], [], []
        for weight, bias in self.linears:
            y = (x @ weight.T.contiguous())[0]
            parts.append(y if bias is None else y + bias)
            extremes.append(torch.stack(torch.aminmax(weight)))
            if bias is not None:
                biases.append(bias)
        probe(self.where, "weight", torch.cat(extremes))
        if biases:
            probe(self.where, "weight", torch.cat(biases))
        return probe(self.where, "output", torch.cat(parts))


def hold_projections(conditioner: nn.Module) -> None:
    """Make the AdaLN linears of a conditioner parameters of it."""
    for module in conditioner.modules():
        if isinstance(module, ModulationProjection):
            module.hold()


class ConditionSource(nn.Module, ABC):
    """Where a graph has its condition from.

    Attributes:
        inputs: names of the graph's inputs it reads.
    """

    inputs: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, feeds: Mapping[str, torch.Tensor]) -> Levels:
        """What the trunk is given, and the noise level, of the graph's inputs by name."""


class BakedCondition(ConditionSource):
    """Everything is a constant: of the trunk's own, and the noise level."""

    def __init__(self, level: NoiseLevel) -> None:
        super().__init__()
        self.level = level

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> Levels:
        return {}, self.level.signal, self.level.noise


class BankedCondition(ConditionSource):
    """What the conditioner made at export is an input of the graph, and so is the noise level [2]."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.inputs = (*names, LEVEL)

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> Levels:
        given = {name: feeds[name] for name in self.inputs[:-1]}
        return given, feeds[LEVEL][0], feeds[LEVEL][1]


class LiveCondition(ConditionSource):
    """The conditioner is in the graph; embeddings and timestep are inputs.

    Args:
        conditioner: of the family.
        levels: signal and noise of every timestep, [T, 2].
    """

    def __init__(self, conditioner: Conditioner, levels: torch.Tensor) -> None:
        super().__init__()
        hold_projections(conditioner)
        self.conditioner = conditioner
        self.levels = constant(levels)
        self.inputs = (*conditioner.inputs, TIMESTEP)

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> Levels:
        level = self.levels[feeds[TIMESTEP]][0]
        return self.conditioner(feeds[TIMESTEP], feeds), level[0], level[1]
