"""The match graph: it takes two feature maps and points, and gives target pixels and cosines.

It computes what `ditf.runtime.matching.points` computes, in matrix products, for any number of points and any
target size (docs/design.md, "Exact matching"). The host makes the interpolation matrices
(`interpolation_inputs`).
"""

from __future__ import annotations

import torch
from torch import nn

from ditf.runtime.matching.cells import TIE_TOLERANCE, TINY_SQUARE

INPUTS = ("source", "target", "point_rows", "point_columns", "rows", "columns")
OUTPUTS = ("points", "scores")


CANCELLED = 1e-4
"""The smallest trusted ratio of |up(F)|^2 to up(|F|^2). Below it, cells are opposite to 0.02 %."""


class MatchGraph(nn.Module):
    """Finds the exact argmax of the cosine over the bilinearly upsampled target."""

    def forward(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        point_rows: torch.Tensor,
        point_columns: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Match N points.

        Args:
            source, target: features [1, C, h, w].
            point_rows, point_columns: float32 [N, h], [N, w].
            rows, columns: float32 [H, h], [W, w]; (H, W) is the target image's size.

        Returns:
            points float32 [N, 2], (x, y) px; scores float32 [N].
        """
        _, _, h, w = source.shape
        source_cells = source[0].to(torch.float32).flatten(1)
        target_cells = target[0].to(torch.float32)
        weights = (point_rows[:, :, None] * point_columns[:, None, :]).flatten(1)
        queries = weights @ source_cells.transpose(0, 1)
        queries = queries * _inverse_root((queries * queries).sum(dim=1, keepdim=True))
        inner = (queries @ target_cells.flatten(1)).unflatten(1, (h, w))
        upsampled = rows @ (inner @ columns.transpose(0, 1))
        squared = _quadratic(rows) @ _norm_kernel(target_cells) @ _quadratic(columns).transpose(0, 1)
        # Where cells point away from each other this sum cancels, and float32 leaves noise. The upsampled
        # |f|^2 is an upper bound of it; a value far below the bound is not trusted.
        bound = rows @ target_cells.square().sum(0) @ columns.transpose(0, 1)
        squared = torch.maximum(squared, CANCELLED * bound)
        scores = (upsampled * _inverse_root(squared)).flatten(1)
        best = scores.amax(dim=1, keepdim=True)
        # Runtimes disagree on which of several maxima ArgMax returns, so a minimum finds the first index.
        count = scores.shape[1]
        index = torch.arange(count, dtype=torch.int32)
        last = torch.full((), count - 1, dtype=torch.int32)
        first = torch.where(scores >= best - float(TIE_TOLERANCE), index, last).amin(dim=1)
        width = columns.shape[0]
        y = torch.div(first, width, rounding_mode="trunc")
        points = torch.stack([first - y * width, y], dim=1).to(torch.float32)
        return points, best[:, 0].clamp(-1.0, 1.0)


def _inverse_root(squared: torch.Tensor) -> torch.Tensor:
    return 1.0 / torch.sqrt(torch.clamp(squared, min=TINY_SQUARE))


def _quadratic(matrix: torch.Tensor) -> torch.Tensor:
    following = torch.cat([matrix[:, 1:], torch.zeros_like(matrix[:, :1])], dim=1)
    return torch.cat([matrix * matrix, matrix * following], dim=1)


def _norm_kernel(cells: torch.Tensor) -> torch.Tensor:
    right = torch.cat([cells[:, :, 1:], cells[:, :, -1:]], dim=2)
    below = torch.cat([cells[:, 1:], cells[:, -1:]], dim=1)
    below_right = torch.cat([right[:, 1:], right[:, -1:]], dim=1)
    diagonals = (cells * below_right).sum(0) + (right * below).sum(0)
    top = torch.cat([(cells * cells).sum(0), 2.0 * (cells * right).sum(0)], dim=1)
    bottom = torch.cat([2.0 * (cells * below).sum(0), 2.0 * diagonals], dim=1)
    return torch.cat([top, bottom], dim=0)
