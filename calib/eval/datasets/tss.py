"""TSS (Taniai, Sinha, Sato, CVPR 2016): 400 pairs with dense flow on the foreground.

    TSS_CVPR2016/{FG3DCar,JODS,PASCAL}/PAIR/image1.png, image2.png
    TSS_CVPR2016/.../flow1.flo, flow2.flo      Middlebury .flo; of image 1 to image 2, and back
    TSS_CVPR2016/.../mask1.png, mask2.png      foreground of each image

Every pair is used both ways, as DenseMatching's datasets/semantic_matching_datasets/tss.py does.

Protocol (Taniai's evaluation kit, "flow accuracy" at 5 px in images whose longer side is 100; weakalign,
SFNet and DCCNet alike: PCK at alpha 0.05): over the foreground pixels whose true flow is known (below 1e9,
Middlebury's mark), correct where the distance is at most alpha * max(height, width of the image that the
flow starts in). The field's figure is the mean of the pairs' shares, by group and over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditf.calib.eval.datasets.base import (
    LARGEST,
    BadItem,
    ImageSource,
    Reading,
    check_sizes,
    collect,
    folder,
    header_size,
    picture,
)
from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import read_regular

SPLITS = ("test",)
GROUPS = ("FG3DCar", "JODS", "PASCAL")
UNKNOWN = 1e9
_MAGIC = 202021.25
_HEADER = 12  # bytes: magic, width, height


@dataclass(frozen=True)
class FlowPair:
    """Two images and the files of the flow from the source's foreground to the target."""

    name: str
    source: ImageSource
    target: ImageSource
    flow: Path
    mask: Path
    size: tuple[int, int]
    category: str
    group: str = ""

    @property
    def images(self) -> tuple[ImageSource, ImageSource]:
        return self.source, self.target

    @property
    def reference(self) -> float:
        """The length that alpha is a share of, px."""
        return float(max(self.size))

    def check(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Check that flow and mask have the source's size; raises BadItem."""
        check_sizes(self.name, self.images[:1], sizes[:1], [self.size])

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """Flow float32 [H, W, 2] (x, y) px, and bool [H, W] of foreground pixels where it is known."""
        flow = read_flow(self.flow)
        with picture(self.mask) as image:
            foreground = np.asarray(image.convert("L")) > 127
        return flow, foreground & (np.abs(flow) < UNKNOWN).all(axis=2)


def read_tss(data: Path, split: str) -> Reading:
    """Read both directions of every pair, sorted within each group.

    Raises:
        InputError: there are no pairs.
    """
    folder(data)
    pairs = [(path, way) for group in GROUPS for path in sorted((data / group).glob("*/")) for way in (1, 2)]
    if not pairs:
        raise InputError(f"{data} holds none of {', '.join(GROUPS)}", "docs/eval.md has the layout")
    return collect(pairs, lambda entry: _read_pair(*entry))


def _read_pair(path: Path, way: int) -> FlowPair:
    pair = FlowPair(
        name=f"{path.parent.name}/{path.name}/{way}",
        source=path / f"image{way}.png",
        target=path / f"image{3 - way}.png",
        flow=path / f"flow{way}.flo",
        mask=path / f"mask{way}.png",
        size=header_size(path / f"mask{way}.png"),
        category=path.parent.name,
    )
    if read_flow(pair.flow).shape[:2] != pair.size:
        raise BadItem(f"{pair.flow} has another size than {pair.mask.name}")
    if not pair.truth()[1].any():
        raise BadItem(f"{pair.flow} is known nowhere in the foreground")
    return pair


def read_flow(path: Path) -> np.ndarray:
    """A Middlebury .flo file, float32 [H, W, 2] (x, y) px; raises BadItem."""
    try:
        data = read_regular(path, LARGEST)
    except FileNotFoundError:
        raise BadItem(f"{path}: no such flow") from None
    except OSError as error:
        raise BadItem(f"{path} cannot be read ({error.strerror})") from None
    if len(data) < _HEADER or np.frombuffer(data, "<f4", 1)[0] != _MAGIC:
        raise BadItem(f"{path} is no .flo file")
    width, height = (int(n) for n in np.frombuffer(data, "<i4", 2, offset=4))
    if min(width, height) < 1 or len(data) != _HEADER + 8 * width * height:
        raise BadItem(f"{path} is truncated or malformed: {len(data)} bytes for {width}x{height} pixels")
    flow = np.frombuffer(data, "<f4", offset=_HEADER).reshape(height, width, 2)
    if np.isnan(flow).any():
        raise BadItem(f"{path} holds NaN")
    return flow
