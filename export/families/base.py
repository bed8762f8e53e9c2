"""What a model family tells the exporter, and the two things every family shares: names and checks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ditf.export.checkpoint import Checkpoint, Weights
from ditf.export.graph.precision import Precision
from ditf.export.graph.trunk import Trunk
from ditf.runtime.errors import InputError

Condition = Mapping[str, torch.Tensor]
"""What conditions the transformer beside the timestep, as its own forward takes it, batch 1."""


@dataclass(frozen=True)
class Defaults:
    """Settings of a family where the user gives none; `source` says where they come from.

    `layer` None is half of the depth.
    """

    timestep: int
    source: str
    layer: int | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model in execution order: ((kind, count), ...)."""

    kinds: tuple[tuple[str, int], ...]

    @property
    def count(self) -> int:
        return sum(count for _, count in self.kinds)

    def resolve(self, layer: str) -> int:
        """The global index of a layer given as "9" or "double.9".

        Raises:
            InputError: not a layer of this model; says the range and the names.
        """
        offset = 0
        for kind, count in self.kinds:
            match = re.fullmatch(rf"{kind}\.(\d+)", layer)
            if match and int(match[1]) < count:
                return offset + int(match[1])
            offset += count
        if layer.isdecimal() and int(layer) < self.count:
            return int(layer)
        names = " or ".join(f"{kind}.0..{kind}.{count - 1}" for kind, count in self.kinds)
        raise InputError(
            f"layer {layer} is out of range", f"this model has layers 0..{self.count - 1}, or {names}"
        )

    def describe(self, index: int) -> str:
        """For people: "layer 9 = double.9 of 19+38"."""
        counts = "+".join(str(count) for _, count in self.kinds)
        offset = 0
        for kind, count in self.kinds:
            if index < offset + count:
                return f"layer {index} = {kind}.{index - offset} of {counts}"
            offset += count
        raise IndexError(index)


@dataclass(frozen=True)
class TrunkSpec:
    """What a truncated transformer is fixed to.

    Attributes:
        layer: k; blocks 0..k-1 run.
        condition, timestep: constants of the graph.
        size: (H, W) of the image in pixels; grid: (h, w) in tokens.
        precision: of the graph.
    """

    layer: int
    condition: Condition
    timestep: int
    size: tuple[int, int]
    grid: tuple[int, int]
    precision: Precision


class Family(ABC):
    """Facts about one family of Diffusion Transformers, for one checkpoint's transformer config.

    What most diffusers transformers have in common is here; a family overrides what differs.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]  # in diffusers
    defaults: ClassVar[Defaults]
    takes_prompt: ClassVar[bool]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @property
    def blocks(self) -> Blocks:
        """The transformer's blocks."""
        return Blocks((("block", int(self.config["num_layers"])),))

    @property
    def channels(self) -> int:
        """Width of the hidden states."""
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def patch_size(self) -> int:
        """Latent pixels along the side of a token."""
        return int(self.config["patch_size"])

    @property
    def sample_size(self) -> int:
        """Latent pixels along the side of the images the model was trained on."""
        return int(self.config["sample_size"])

    @abstractmethod
    def encode_condition(
        self, checkpoint: Checkpoint, prompt: str | None, class_label: int | None
    ) -> Condition:
        """Run the text encoders, or look the class up, once."""

    @abstractmethod
    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        """Keyword arguments of the unmodified transformer's forward, beside `hidden_states`.

        Args:
            size: (H, W) of the image in pixels.
            batch: number of latents.
        """

    def reference_block(self, transformer: torch.nn.Module, index: int) -> torch.nn.Module:
        """Block `index` of the unmodified transformer."""
        return transformer.get_submodule(f"transformer_blocks.{index}")

    def reference_attention(self, block: torch.nn.Module) -> torch.nn.Module:
        """The attention of a block whose first input is its modulated first norm."""
        return block.get_submodule("attn1")

    @abstractmethod
    def build_trunk(self, weights: Weights, spec: TrunkSpec) -> Trunk:
        """Blocks 0..k-1 and the modulation of block k, as a module to trace."""

    def require(self, **allowed: tuple[Any, ...]) -> None:
        """Check config values this family's graph depends on.

        Raises:
            InputError: the config has another value.
        """
        for key, values in allowed.items():
            if key in self.config and self.config[key] not in values:
                raise InputError(
                    f"{self.name} with {key}={self.config[key]!r} is not supported",
                    f"supported: {', '.join(map(repr, values))}",
                )
