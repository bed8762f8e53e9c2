"""The size of the images that a graph takes."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    def cells(self, cell: int) -> tuple[int, int]:
        """Rows and columns of whole cells, `cell` pixels wide."""
        return self.height // cell, self.width // cell

    def below(self, cell: int) -> Size:
        """The largest size, no larger than this one, that is a multiple of a cell."""
        return Size(*(max(length // cell, 1) * cell for length in self))

    def above(self, cell: int) -> Size:
        """The smallest size, no smaller than this one, that is a multiple of a cell."""
        return Size(*(max(-(-length // cell), 1) * cell for length in self))
