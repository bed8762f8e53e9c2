"""Range probes: they show the values that a graph computes in its own precision while it runs in PyTorch.

Without a recorder a probe does nothing. It leaves no trace in an exported graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

Stream = Literal["image", "text", "both", "condition"]
"""Whose values these are: the tokens of the image, of the text, of both joined, or the condition itself."""


@dataclass(frozen=True)
class Where:
    """The module that computes a value.

    Attributes:
        name: the module's name in the checkpoint, such as "transformer_blocks.3.attn1.to_out.0".
        stream: whose tokens the value has. It is "image" for one sequence in which text or padding precedes
            the image; a recorder, which knows the number of image tokens, then counts the others as "text".
    """

    name: str
    stream: Stream = "image"


Recorder = Callable[[Where, str, torch.Tensor], None]
"""A function that is called with where a value is computed, the kind of value, and the value."""

_RECORDERS: list[Recorder] = []


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Show `recorder` every probed value."""
    _RECORDERS.append(recorder)
    try:
        yield
    finally:
        _RECORDERS.remove(recorder)


def probe(where: Where | None, kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """Show a tensor to the recorders, and return it unchanged.

    Args:
        where: what computes it; None for a value that no recorder needs.
        kind: one of those of `ditf.calib.recipe`.
    """
    if where is not None:
        for recorder in _RECORDERS:
            recorder(where, kind, tensor)
    return tensor


def branch_of(name: str) -> str:
    """The branch of the residual that a module of the checkpoint belongs to: a submodule of its block.

    "transformer_blocks.3.attn1.to_out.0" -> "transformer_blocks.3.attn1".
    """
    match = re.match(r".*?(blocks|layers|refiner)\.\d+\.\w+", name)
    return name if match is None else match[0]


def joined(names: tuple[str, ...]) -> str:
    """One name for modules that are computed as one, such as "blocks.3.attn1.to_q+to_k+to_v"."""
    first, *others = names
    return "+".join([first, *(name.rsplit(".", 1)[-1] for name in others)])
