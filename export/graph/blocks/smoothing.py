"""Where a factor for each channel can move from what makes a value to what reads it, for free.

A block says what it allows in `smoothings()`; `ditf.export.graph.quantised` chooses the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """Some output or input channels of a linear.

    Attributes:
        path: of the linear in the trunk.
        start: of the channels.
    """

    path: str
    start: int = 0


@dataclass(frozen=True)
class Smoothing:
    """Channels that a factor can move from what makes them to what reads them.

    Attributes:
        readers: whose input channels they are.
        norm: path of the norm that makes them, or "".
        makers: linears whose output channels they are; constants: tensors [1, H, L, D] that are such outputs.
        channels: how many.
    """

    channels: int
    readers: Sequence[Columns]
    norm: str = ""
    makers: Sequence[Columns] = ()
    constants: Sequence[str] = ()
