"""The training data of the demo model: drawn animals, and noised views of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ditf.calib.eval.creature_pairs import TRAIN
from ditf.calib.eval.creatures import SPECIES, draw_creature

SIZE, PATCH = 96, 8
NULL = len(SPECIES)  # the class of an unlabelled picture: what features are taken with
_NULL_SHARE = 0.5


def training_pictures(path: Path, count: int) -> np.ndarray:
    """uint8 [count, SIZE, SIZE, 3], picture i of species i modulo their number; drawn the first time."""
    if not path.exists():
        partial = path.with_suffix(".part")
        drawn = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, SIZE, SIZE, 3))
        for index in range(count):
            drawn[index] = draw_creature(index % len(SPECIES), (TRAIN, index), SIZE).image
            if (index + 1) % 1000 == 0:
                print(f"drew {index + 1} of {count} pictures", flush=True)
        drawn.flush()
        partial.replace(path)
    return np.load(path, mmap_mode="r")


@dataclass
class Batch:
    """Noised views: view i and view B / 2 + i are of one picture.

    Attributes:
        noised: [B, 3, SIZE, SIZE]; t: [B] in 0..1; labels: [B].
        kept: [B, n] tokens that are seen.
        clean: [B, n, PATCH * PATCH * 3], the seen tokens of x_0.
        partners: [B / 2, n], for each seen token of the first view the place among the seen ones of the
            second that shows the same; -1 where none does.
    """

    noised: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor
    clean: torch.Tensor
    partners: torch.Tensor


def draw_batch(
    pictures: np.ndarray, count: int, kept: float, shift: float, seed: int, step: int, device: str
) -> Batch:
    """The batch of a step: the same whenever it is drawn.

    Args:
        pictures: from `training_pictures`.
        count: of views, two of each picture.
        kept: share of the tokens that is seen.
        shift: mean of the logit of t.
    """
    rng = np.random.default_rng([seed, step])
    generator = torch.Generator().manual_seed(seed * 10**9 + step)
    half = count // 2
    index = np.sort(rng.integers(0, len(pictures), half))
    pixels = torch.from_numpy(pictures[index]).permute(0, 3, 1, 2).float() / 127.5 - 1
    views = [draw_view(pixels, generator) for _ in range(2)]
    clean = torch.cat([view for view, _ in views])
    labels = torch.from_numpy(np.where(rng.random(count) < _NULL_SHARE, NULL, np.tile(index, 2) % NULL))
    t = torch.sigmoid(shift + torch.randn(count, generator=generator))
    level = t[:, None, None, None]
    noised = (1 - level) * clean + level * torch.randn(clean.shape, generator=generator)
    tokens = patches(clean)
    seen = torch.rand(tokens.shape[:2], generator=generator).argsort(1)[:, : int(tokens.shape[1] * kept)]
    found = partners(views[0][1], views[1][1], seen)
    parts = (noised, t, labels, seen, gather(tokens, seen), found)
    return Batch(*(part.to(device) for part in parts))


def draw_view(pictures: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of each picture [B, 3, H, W], flipped, moved, scaled, turned and recoloured.

    Returns:
        The views, and [B, 2, 3] from a view's normalised coordinates to its picture's.
    """
    count = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    scale, angle = torch.exp(uniform(-0.35, 0.25)), uniform(-0.35, 0.35)
    flip = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [(cosine * flip, -sine, uniform(-0.35, 0.35)), (sine * flip, cosine, uniform(-0.35, 0.35))]
    to_picture = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = nn.functional.affine_grid(to_picture, list(pictures.shape), align_corners=False)
    view = nn.functional.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    order = torch.rand(count, 3, generator=generator).argsort(1)  # of the colours
    view = torch.gather(view, 1, order[:, :, None, None].expand_as(view))
    mean = view.mean((2, 3), keepdim=True)
    view = (view - mean) * uniform(0.6, 1.3, 3, 1, 1) + mean + uniform(-0.25, 0.25, 3, 1, 1)
    return view.clamp(-1, 1), to_picture


def partners(first: torch.Tensor, second: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`Batch.partners`, from what `draw_view` returned of both views and the seen tokens [B, n]."""
    side = SIZE // PATCH
    half, tokens = len(first), side * side
    centres = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], -1).reshape(tokens, 3)
    in_picture = torch.einsum("bij,nj->bni", first, places)
    to_picture = torch.cat([second, torch.tensor([[[0.0, 0.0, 1.0]]]).expand(half, 1, 3)], 1)
    padded = nn.functional.pad(in_picture, (0, 1), value=1.0)
    in_second = torch.einsum("bij,bnj->bni", torch.linalg.inv(to_picture), padded)[..., :2]
    inside = (in_picture.abs() <= 1).all(-1) & (in_second.abs() < 1).all(-1)
    column, row = ((in_second + 1) * side / 2).long().clamp(0, side - 1).unbind(-1)
    found = torch.where(inside, row * side + column, -1)
    count = kept.shape[1]
    rank = torch.full((half, tokens), -1).scatter(1, kept[half:], torch.arange(count).expand(half, -1))
    found = torch.gather(found, 1, kept[:half])
    return torch.where(found >= 0, torch.gather(rank, 1, found.clamp_min(0)), -1)


def patches(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> [B, tokens, PATCH * PATCH * 3], in the order of the model's output."""
    count, channels, height, width = images.shape
    cut = images.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return torch.einsum("nchpwq->nhwpqc", cut).flatten(3).flatten(1, 2)


def gather(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Take tokens of each sequence: [B, N, C], [B, n] -> [B, n, C]."""
    return torch.gather(tokens, 1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
