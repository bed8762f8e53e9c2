"""Where a factor for each channel can move from what makes a value to what reads it, without extra work.

A block lists what it allows in `smoothings()`; `ditf.export.graph.quantised_linears` chooses the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Channels:
    """A run of output or input channels of a linear.

    Attributes:
        path: of the linear in the block.
        start: the first of the channels.
    """

    path: str
    start: int = 0


@dataclass(frozen=True)
class Smoothing:
    """Channels of a value whose factors can move from what makes the value to what reads it.

    Attributes:
        channels: how many there are.
        readers: linears whose input channels they are.
        norm: path of the norm that makes them, or "".
        makers: linears whose output channels they are.
        constants: paths of constant tensors [1, H, L, D] that take the place of such outputs, or [1, H, 1, D]
            that are added to them.
    """

    channels: int
    readers: Sequence[Channels]
    norm: str = ""
    makers: Sequence[Channels] = ()
    constants: Sequence[str] = ()
