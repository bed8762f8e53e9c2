"""The facts that a model family gives the exporter, and the names and checks that families share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ditf.export.checkpoints.layout import Checkpoint
from ditf.export.checkpoints.weights import Weights
from ditf.export.graph.blocks.condition_tensors import ConditionTensors
from ditf.export.graph.blocks.trunk import Trunk
from ditf.export.graph.condition import Conditioner
from ditf.export.graph.precision import Precision
from ditf.runtime.errors import InputError

Condition = Mapping[str, torch.Tensor]
"""Text-encoder outputs for one prompt, or the class label, with batch 1: `prompt_embeds` and so on. The names
are the inputs of a graph exported with --conditioning live."""


@dataclass(frozen=True)
class Defaults:
    """The settings that apply where the user gives none.

    Attributes:
        source: where the settings come from.
        layer: k; None means half of the depth.
        size: (H, W) in pixels; None means the size that the model was trained on.
        channels: the massive channels that were published for this model, if any were.
    """

    timestep: int
    source: str
    layer: int | None = None
    prompt: str | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    channels: tuple[int, ...] | None = None


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

    def locate(self, index: int) -> tuple[str, int]:
        """The kind of a block, and its number among the blocks of its kind."""
        for kind, count in self.kinds:
            if index < count:
                return kind, index
            index -= count
        raise IndexError(index)

    def describe(self, index: int) -> str:
        """A description for people: "layer 9 = double.9 of 19+38"."""
        counts = "+".join(str(count) for _, count in self.kinds)
        kind, number = self.locate(index)
        return f"layer {index} = {kind}.{number} of {counts}"


@dataclass(frozen=True)
class TrunkSpec:
    """What a truncated transformer is built for.

    Attributes:
        layer: k; blocks 0..k-1 run.
        size: (H, W) of the image in pixels.
        grid: (h, w) of the image in tokens.
        text_tokens: L, the text's length.
        precision: of the graph.
    """

    layer: int
    size: tuple[int, int]
    grid: tuple[int, int]
    text_tokens: int
    precision: Precision


class Family(ABC):
    """Facts about one family of Diffusion Transformers, for one checkpoint's transformer config.

    The defaults here hold for most diffusers transformers; a family overrides those that differ.

    Args:
        config: the transformer's, completed with the defaults of its class.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]  # in diffusers
    takes_prompt: ClassVar[bool]
    takes_guidance: bool = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @property
    @abstractmethod
    def defaults(self) -> Defaults: ...

    @property
    def blocks(self) -> Blocks:
        """The transformer's blocks."""
        return Blocks((("block", int(self.config["num_layers"])),))

    @property
    def channels(self) -> int:
        """C, the width of the hidden states."""
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def patch_size(self) -> int:
        """Latent pixels along the side of a token."""
        return int(self.config["patch_size"])

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.config["in_channels"])

    @property
    def sample_size(self) -> int:
        """Latent pixels along the side of the images the model was trained on."""
        return int(self.config["sample_size"])

    @property
    def largest_grid(self) -> int | None:
        """The longest side in tokens that the position embedding covers; None where it covers any."""
        return None

    vae_class: ClassVar[str] = "AutoencoderKL"
    """The diffusers class of the published checkpoints' VAE."""

    shifts_latents: ClassVar[bool] = True
    """Whether the pipelines subtract `shift_factor` of the VAE's config from its latents."""

    pipelines: ClassVar[tuple[str, ...]] = ()
    """Diffusers pipelines that encode prompts: the checkpoint's own if it is one of them, else the first."""

    text_classes: ClassVar[tuple[str, ...]] = ()
    """The text encoders and tokenizers of its checkpoints in transformers; no other class is imported."""

    ddpm: ClassVar[bool] = False
    """Whether the published checkpoints were trained with DDPM noise. The other families know flow matching
    only, whatever scheduler a checkpoint is saved with."""

    short_text: ClassVar[int | None] = None
    """The text tokens of a short prompt, in families that drop the masked tokens after them."""

    longest_text: ClassVar[int | None] = None
    """The most text tokens, in families of which some checkpoints read more than `example_condition` has."""

    @abstractmethod
    def example_condition(self) -> Condition:
        """Tensors of the shapes that `encode_conditions` makes, with arbitrary values and nothing masked."""

    @abstractmethod
    def encode_conditions(
        self, checkpoint: Checkpoint, subjects: Sequence[str | int], guidance: float | None
    ) -> list[Condition]:
        """Run the text encoders on prompts, or look up class labels.

        Raises:
            InputError: a prompt is longer than an encoder reads.
        """

    @property
    def null_class(self) -> int:
        """The label of a class-conditional family that stands for no class."""
        raise NotImplementedError(f"{self.name} has no classes")

    leading_tokens: ClassVar[int] = 0
    """The text tokens before T5's; --text-tokens does not change them."""

    text_multiple: ClassVar[int] = 1
    """The model pads a text to a multiple of this length, with tokens that it reads."""

    text_paddings: ClassVar[tuple[str, ...]] = ()
    """The values of --text-padding, in families that can read the padding of their text in several ways."""

    text_padding: str | None = None
    """The one that is used; None in families with one way."""

    def text_length(self, condition: Condition) -> int:
        """L, the number of text tokens of a condition, masked ones included."""
        embeds = condition.get("prompt_embeds")
        return 0 if embeds is None else embeds.shape[1]

    def text_tokens(self, condition: Condition) -> int:
        """The number of text tokens of a condition that are read; the others, at its end, are masked."""
        return self.text_length(condition)

    def trim_text(self, condition: Condition, tokens: int) -> Condition:
        """The condition with its first text tokens only; exact if all tokens that are read are among them."""
        return {
            name: tensor[:, :tokens] if name in ("prompt_embeds", "prompt_attention_mask") else tensor
            for name, tensor in condition.items()
        }

    def block_name(self, index: int) -> str:
        """The name of block `index` in the transformer and in its weights."""
        return f"transformer_blocks.{index}"

    text_stream: ClassVar[bool] = True
    """Whether the text has a residual of its own. PixArt's caption is only attended to."""

    attention_name: ClassVar[str] = "attn1"
    """The submodule of a block whose input is the block's modulated first norm."""

    rms_norms: ClassVar[bool] = False
    """Whether the modulated norms are RMSNorms, which subtract no mean."""

    @abstractmethod
    def reference_inputs(
        self, condition: Condition, timestep: int, size: tuple[int, int], grid: tuple[int, int], batch: int
    ) -> dict[str, Any]:
        """The keyword arguments of the unmodified transformer's forward; the latents are its first argument.

        Args:
            size: (H, W) of the image in pixels; grid: (h, w) in tokens.
            batch: the number of latents.
        """

    def reference_latents(self, x_t: torch.Tensor) -> Any:
        """The first argument of the unmodified transformer's forward, from latents [B, c, h', w']."""
        return x_t

    def reference_tokens(self, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Split a sequence of the unmodified transformer into image [..., N, C] and text [..., L, C].

        Args:
            tokens: [..., M, C]; L is 0 where they are the image's alone.
            count: N.
        """
        return tokens[..., -count:, :], tokens[..., :-count, :]

    @abstractmethod
    def conditioner(self, weights: Weights, spec: TrunkSpec) -> Conditioner:
        """The module that computes modulation and text for blocks 0..k-1, and for block k's norm.

        Args:
            spec: of the trunk that reads them, with the precision of the conditioner itself.
        """

    @abstractmethod
    def trunk(self, weights: Weights, spec: TrunkSpec, constants: ConditionTensors | None) -> Trunk:
        """Blocks 0..k-1 as a module to trace.

        Args:
            constants: the conditioner's tensors, to be folded in; None where they are given at run time.
        """

    def require(self, **allowed: tuple[Any, ...]) -> None:
        """Check the config values that this family's graph depends on.

        Raises:
            InputError: the config has another value.
        """
        for key, values in allowed.items():
            if key in self.config and self.config[key] not in values:
                raise InputError(
                    f"{self.name} with {key}={self.config[key]!r} is not supported",
                    f"supported: {', '.join(map(repr, values))}",
                )


def check_prompt(prompt: str, tokenizer: Any, limit: int, encoder: str, chat: str | None = None) -> None:
    """Reject a prompt that a text encoder would cut.

    Args:
        limit: tokens that the encoder reads.
        encoder: its name, for the message.
        chat: the text that the tokenizer's chat template makes of the prompt, where the pipeline uses it.

    Raises:
        InputError: the prompt has more tokens than the limit; says both.
    """
    text, where = (prompt, "") if chat is None else (chat, " in its template")
    count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
    if count > limit:
        raise InputError(
            f"the prompt {prompt[:40]!r}... has {count} tokens{where}, {encoder} reads {limit}",
            "shorten it, or give what diffusers makes of it with --prompt-embeds",
        )
