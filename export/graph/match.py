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

UNRESOLVED = 1e-6
"""The smallest ratio of |up(F)| to up(|F|) that float32 resolves. Where the cells around a pixel cancel
further, the direction of up(F) is rounding noise, and its cosine is scaled down towards 0."""


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
        scores = self.cosines(source, target, point_rows, point_columns, rows, columns).flatten(1)
        best = scores.amax(dim=1, keepdim=True)
        # Runtimes disagree on which of several maxima ArgMax returns, so a minimum finds the first index.
        count = scores.shape[1]
        index = torch.arange(count, dtype=torch.int32)
        last = torch.full((), count - 1, dtype=torch.int32)
        first = torch.where(scores >= best - float(TIE_TOLERANCE), index, last).amin(dim=1)
        width = columns.shape[0]
        y = torch.div(first, width, rounding_mode="trunc")
        points = torch.stack([first - y * width, y], dim=1).to(torch.float32)
        return points, best[:, 0]

    def cosines(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        point_rows: torch.Tensor,
        point_columns: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """The cosine of every point with every pixel, float32 [N, H, W] in [-1, 1]; see `forward`."""
        channels, h, w = source.shape[1:]
        source_cells = source[0].to(torch.float32).flatten(1)
        target_cells = target[0].to(torch.float32)
        weights = (point_rows[:, :, None] * point_columns[:, None, :]).flatten(1)
        queries = weights @ source_cells.transpose(0, 1)
        queries = queries / queries.square().sum(dim=1, keepdim=True).clamp(min=TINY_SQUARE).sqrt()
        inner = (queries @ target_cells.flatten(1)).unflatten(1, (h, w))
        upsampled = rows @ (inner @ columns.transpose(0, 1))
        longest = rows @ target_cells.square().sum(0).sqrt() @ columns.transpose(0, 1)
        least = (UNRESOLVED * longest).clamp(min=TINY_SQUARE**0.5)
        if channels == 1:
            # The cosine is the sign. Dividing by the length that was itself rounded would break ties.
            return upsampled / torch.maximum(upsampled.abs(), least)
        parts = _corner_form(rows) @ _corner_factors(target_cells) @ _corner_form(columns).transpose(0, 1)
        norms = parts.square().sum(0).sqrt()
        return (upsampled / torch.maximum(norms, least)).clamp(-1.0, 1.0)


def _corner_form(matrix: torch.Tensor) -> torch.Tensor:
    """Sort the weights of an axis by the interval between cells that a pixel lies in.

    Args:
        matrix: [pixels, cells]; a row has one non-zero or two neighbouring ones.

    Returns:
        [pixels, 2 * cells]: at the column of the interval's first cell its weight, and `cells` further on the
        weight of the next cell.
    """
    used = (matrix > 0).to(torch.float32)
    nothing = torch.zeros_like(matrix[:, :1])
    first = used - used * torch.cat([nothing, used[:, :-1]], dim=1)
    following = torch.cat([matrix[:, 1:], nothing], dim=1)
    return torch.cat([matrix * first, following * first], dim=1)


def _corner_factors(cells: torch.Tensor) -> torch.Tensor:
    """The triangular factor R of the four cells around every interval: |sum of w_j f_j| = |R w|.

    As a quadratic form in the inner products of the cells, the squared norm would cancel where they point
    away from each other, and float32 would leave noise. R w rounds as the upsampled vector itself does. The
    modified Gram-Schmidt process gives R to that accuracy (Bjorck 1967).

    Args:
        cells: [C, h, w].

    Returns:
        [4, 2 * h, 2 * w], the rows of R laid out for `_corner_form`.
    """
    right = torch.cat([cells[:, :, 1:], cells[:, :, -1:]], dim=2)
    below = torch.cat([cells[:, 1:], cells[:, -1:]], dim=1)
    rest = [cells, right, below, torch.cat([right[:, 1:], right[:, -1:]], dim=1)]
    zero = torch.zeros_like(cells[0])
    factors = []
    for index in range(4):
        length = rest[index].square().sum(0).sqrt()
        inverse = 1.0 / length.clamp(min=TINY_SQUARE**0.5)
        row = [zero] * index + [length]
        for other in range(index + 1, 4):
            row.append((rest[index] * rest[other]).sum(0) * inverse)
            rest[other] = rest[other] - (row[other] * inverse) * rest[index]
        top, bottom = torch.cat(row[:2], dim=1), torch.cat(row[2:], dim=1)
        factors.append(torch.cat([top, bottom], dim=0))
    return torch.stack(factors)
