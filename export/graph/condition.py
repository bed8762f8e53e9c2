"""What reaches the trunk of the condition: constants, rows of a bank, or computed in the graph."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

from ditf.export.graph.layers import Linear, constant
from ditf.export.graph.taps import Where
from ditf.export.graph.trunk import Given
from ditf.export.noise import NoiseLevel

LEVEL = "level"
MODULATION = "modulation"
TIMESTEP = "timestep"

Levels = tuple[Given, torch.Tensor | float, torch.Tensor | float]
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


class Projection(nn.Module):
    """silu(x) W + b -> modulation rows [R, C], float32; the stacked AdaLN linears of all blocks.

    Args:
        linears: weight [n C, D] and bias of each AdaLN linear, in the order of the rows.
        channels: C, where it is not D, the width of the condition.
        activated: False where x itself is read, without the silu.
    """

    def __init__(
        self,
        linears: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        dtype: torch.dtype,
        channels: int | None = None,
        activated: bool = True,
    ) -> None:
        super().__init__()
        self.activated = activated
        self.channels = channels or linears[0][0].shape[1]
        biases = [bias for _, bias in linears if bias is not None]
        self.linear = Linear(
            torch.cat([weight for weight, _ in linears]),
            torch.cat(biases) if biases else None,
            dtype,
            Where(MODULATION, "condition"),
        )

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """[1, D] -> [R, C]."""
        packed = self.linear(nn.functional.silu(embedding) if self.activated else embedding)[0]
        return packed.unflatten(0, (-1, self.channels)).to(torch.float32)


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
        self.conditioner = conditioner
        self.levels = constant(levels)
        self.inputs = (*conditioner.inputs, TIMESTEP)

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> Levels:
        level = self.levels[feeds[TIMESTEP]][0]
        return self.conditioner(feeds[TIMESTEP], feeds), level[0], level[1]
