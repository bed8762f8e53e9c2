"""How the condition reaches the trunk: as constants, as inputs, or computed in the graph.

`--conditioning` names them: `bake` (`BakedCondition`), `bank` (`BankedCondition`) and `live`
(`LiveCondition`).
"""

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
from ditf.runtime.bundles.conditions import TIMESTEP

LEVEL = "level"

Levels = tuple[ConditionTensors, torch.Tensor | float, torch.Tensor | float]
"""The tensors that the trunk is given, and signal and noise of x_t = signal * x_0 + noise * eps."""


class Conditioner(nn.Module, ABC):
    """Computes the tensors that the trunk is given from a condition and a timestep.

    It runs once at export, or is part of the graph (`live`).
    """

    inputs: tuple[str, ...]
    """Names of the condition's tensors that `forward` reads; it also reads the timestep."""

    @abstractmethod
    def forward(
        self, timestep: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Tensors by the names of `graph.blocks.condition_tensors`; the modulation [R, C] is always there.

        Args:
            timestep: int64 [1].
            condition: tensors as `Family.encode_conditions` makes them.
        """


class Frequencies(nn.Module):
    """diffusers' `Timesteps` with its frequencies as constants.

    In a graph they would be exp() of a range. Where a runtime's exp differs in the last bit, a timestep or
    guidance in the thousands turns the difference into 1e-4 of the angle.

    Args:
        timesteps: the module that this one replaces.
        device: of the weights around it.
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
    """The first outputs of linears of a checkpoint. Each linear is read again whenever it is asked for.

    Args:
        parts: name of each linear, and number of its outputs that are used.
    """

    def __init__(self, weights: Weights, parts: Sequence[tuple[str, int]]) -> None:
        self._weights = weights
        self._parts = list(parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        """Weight [out, in] and bias of one linear."""
        name, rows = self._parts[index]
        weight, bias = read_linear(self._weights, name)
        return weight[:rows], None if bias is None else bias[:rows]


class ModulationProjection(nn.Module):
    """The AdaLN linears of all blocks: silu(x) W + b -> modulation rows [R, C], float32.

    They are a third of FLUX.1's parameters. A condition that is baked needs only their product, so each is
    read, multiplied and dropped. `hold` makes them parameters, for a graph that contains them or for several
    conditions.

    Args:
        linears: weight [n C, D] and bias of each AdaLN linear, in the order of the rows.
        precision: of the graph that holds them.
        channels: C, where it differs from D, the width of the condition.
        activated: False where the linears read x itself, without the silu.
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
        """The same product [R C], bit for bit, without holding a linear."""
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
    """Make the AdaLN linears of a conditioner its parameters."""
    for module in conditioner.modules():
        if isinstance(module, ModulationProjection):
            module.hold()


class ConditionSource(nn.Module, ABC):
    """The source of a graph's condition.

    Attributes:
        inputs: names of the graph's inputs that it reads.
    """

    inputs: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, feeds: Mapping[str, torch.Tensor]) -> Levels:
        """The tensors that the trunk is given, and the noise level, from the graph's inputs by name."""


class BakedCondition(ConditionSource):
    """The trunk has its condition as constants, and the noise level is one too."""

    def __init__(self, level: NoiseLevel) -> None:
        super().__init__()
        self.level = level

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> Levels:
        return {}, self.level.signal, self.level.noise


class BankedCondition(ConditionSource):
    """The tensors that the conditioner made at export are inputs, and so is the noise level [2]."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.inputs = (*names, LEVEL)

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> Levels:
        given = {name: feeds[name] for name in self.inputs[:-1]}
        return given, feeds[LEVEL][0], feeds[LEVEL][1]


class LiveCondition(ConditionSource):
    """The conditioner is part of the graph, whose inputs are embeddings and timestep.

    Args:
        conditioner: the family's.
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
