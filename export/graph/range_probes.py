"""Taps: the values that a graph computes in its own precision, seen while it runs in PyTorch.

A tap costs nothing where nobody records, and leaves no trace in an exported graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

Stream = Literal["image", "text", "both", "condition"]


@dataclass(frozen=True)
class Where:
    """What computes a value.

    Attributes:
        name: its module in the checkpoint, such as "transformer_blocks.3.attn1.to_out.0".
        stream: whose tokens the value has; "both" where they are joined. Where text or padding
            stands in front of the image in one sequence it is "image", and a recorder tells them apart by
            their number: what is not the image's is "text".
    """

    name: str
    stream: Stream = "image"


Recorder = Callable[[Where, str, torch.Tensor], None]
"""Called with what computes a value, what kind of value it is, and the value."""

_RECORDERS: list[Recorder] = []


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Show `recorder` every tapped value."""
    _RECORDERS.append(recorder)
    try:
        yield
    finally:
        _RECORDERS.remove(recorder)


def tap(where: Where | None, kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as it is. Kinds are those of `ditf.calib.recipe`."""
    if where is not None:
        for recorder in _RECORDERS:
            recorder(where, kind, tensor)
    return tensor


def branch_of(name: str) -> str:
    """The branch of the residual that a module of the checkpoint belongs to: its block's submodule.

    "transformer_blocks.3.attn1.to_out.0" -> "transformer_blocks.3.attn1".
    """
    match = re.match(r".*?(blocks|layers|refiner)\.\d+\.\w+", name)
    return name if match is None else match[0]


def joined(names: tuple[str, ...]) -> str:
    """One name for modules that are computed together: "blocks.3.attn1.to_q+to_k+to_v"."""
    first, *others = names
    return "+".join([first, *(name.rsplit(".", 1)[-1] for name in others)])
