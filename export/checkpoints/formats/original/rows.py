"""Tensors that are made of rows of stored tensors, and read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError


@dataclass(frozen=True)
class Rows:
    """A tensor that is not read yet: rows of stored tensors, one after another.

    It knows the operations of diffusers' key maps, which all act on rows: `chunk`, `split` and `torch.cat`.

    Attributes:
        parts: (name of a stored tensor, first row, row after the last), ...
        shape: of the whole.
    """

    parts: tuple[tuple[str, int, int], ...]
    shape: torch.Size

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> Rows:
        """All rows of a stored tensor; a scalar counts as one row."""
        return cls(((name, 0, shape[0] if shape else 1),), torch.Size(shape))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.chunk, torch.split):
            return getattr(args[0], function.__name__)(*args[1:], **(kwargs or {}))
        if function is torch.cat:
            return cls.joined(*args, **(kwargs or {}))
        return NotImplemented

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Rows, ...]:
        """Equal pieces, as torch.chunk.

        Raises:
            InputError: the rows are not divisible.
        """
        return self.split([self.shape[0] // chunks] * chunks, dim)

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple[Rows, ...]:
        """Pieces of the given numbers of rows, as torch.split.

        Raises:
            InputError: the sizes do not add up to the rows.
        """
        if dim != 0:
            raise ValueError(f"split along dimension {dim}")
        if sum(sizes) != self.shape[0]:
            raise InputError(
                f"{self.parts[0][0]} is {list(self.shape)}, which the key map of diffusers cannot split into"
                f" {list(sizes)} rows",
                "only models of the published width can be read from their original layout:"
                " save this one with save_pretrained",
            )
        pieces, start = [], 0
        for size in sizes:
            pieces.append(self.between(start, start + size))
            start += size
        return tuple(pieces)

    def between(self, start: int, stop: int) -> Rows:
        """Rows start..stop-1."""
        parts, offset = [], 0
        for name, first, last in self.parts:
            lower, upper = max(start - offset, 0) + first, min(stop - offset + first, last)
            if lower < upper:
                parts.append((name, lower, upper))
            offset += last - first
        return Rows(tuple(parts), torch.Size((stop - start, *self.shape[1:])))

    @classmethod
    def joined(cls, pieces: Sequence[Rows], dim: int = 0) -> Rows:
        """All rows of the pieces, as torch.cat."""
        if dim != 0 or any(piece.shape[1:] != pieces[0].shape[1:] for piece in pieces):
            raise ValueError(f"torch.cat of {[list(piece.shape) for piece in pieces]} along {dim}")
        rows = sum(piece.shape[0] for piece in pieces)
        parts = tuple(part for piece in pieces for part in piece.parts)
        return cls(parts, torch.Size((rows, *pieces[0].shape[1:])))


class RowWeights(Weights):
    """Tensors that are made of the rows of other tensors.

    Args:
        stored: the other tensors.
        rows: {name: its rows}.
    """

    def __init__(self, stored: Weights, rows: Mapping[str, Rows]) -> None:
        self._stored = stored
        self._rows = dict(rows)
        super().__init__(
            {name: tuple(value.shape) for name, value in rows.items()},
            {name: self._bytes(value) for name, value in rows.items()},
            {name: stored.dtypes[value.parts[0][0]] for name, value in rows.items()},
        )

    def _bytes(self, rows: Rows) -> int:
        total = 0
        for name, start, stop in rows.parts:
            shape = self._stored.shapes[name]
            total += self._stored.bytes_of[name] * (stop - start) // (shape[0] if shape else 1)
        return total

    def source(self, name: str) -> str:
        return self._stored.source(self._rows[name].parts[0][0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        wanted = self._rows[name].between(start, stop)
        pieces = [self._stored.rows(*part) for part in wanted.parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _load(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if not shape:
            return self._stored.rows(self._rows[name].parts[0][0], 0, 1)
        return self.rows(name, 0, shape[0])
