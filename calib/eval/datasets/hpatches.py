"""HPatches sequences (Balntas et al., CVPR 2017): planar scenes, changing light (i_*) or viewpoint (v_*).

    hpatches-sequences-release/{i_,v_}NAME/{1..6}.ppm
    hpatches-sequences-release/{i_,v_}NAME/H_1_{2..6}     3x3 numbers: pixels of image 1 -> pixels of image k

Split "test": the 108 sequences (540 pairs) that the field uses, without the eight of large images that
D2-Net left out (LoFTR, glue-factory's datasets/hpatches.py); "all": the 116.

Protocol (SuperPoint, DeTone et al. 2018, section 7.2; rpautrat/SuperPoint's descriptor_evaluation.py): the
corners (0, 0) .. (W-1, H-1) of image 1 go through the estimated and the true homography; correct where their
mean distance is at most 1, 3 or 5 px. As in LoFTR and glue-factory, pixels are those of images whose shorter
side is 480: distances in the target are scaled by 480 / min(its height, its width). No homography counts as
an infinite distance.
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
    collect,
    folder,
    numbers,
    reason,
)
from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import read_regular

SPLITS = ("test", "all")
SHORT_SIDE = 480  # px
LARGE = frozenset(
    {
        "i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding",
        "v_artisans", "v_astronautis", "v_talent",
    }
)  # fmt: skip
_KINDS = {"i": "illumination", "v": "viewpoint"}


@dataclass(frozen=True)
class HomographyPair:
    """Two images of a plane, and float64 [3, 3] from pixels of the source to pixels of the target."""

    name: str
    source: ImageSource
    target: ImageSource
    homography: np.ndarray
    category: str
    group: str = ""

    @property
    def images(self) -> tuple[ImageSource, ImageSource]:
        return self.source, self.target

    def check(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Check nothing: the annotation gives no sizes."""


def read_hpatches(data: Path, split: str) -> Reading:
    """Read the pairs 1-2 to 1-6 of every sequence, sorted.

    Raises:
        InputError: there are no sequences.
    """
    sequences = sorted(
        path for path in folder(data).iterdir() if path.is_dir() and path.name[:2] in ("i_", "v_")
    )
    if split == "test":
        sequences = [path for path in sequences if path.name not in LARGE]
    if not sequences:
        raise InputError(f"{data} holds no sequences i_* or v_*", "docs/eval.md has the layout")
    return collect([(path, k) for path in sequences for k in range(2, 7)], lambda entry: _read_pair(*entry))


def _read_pair(path: Path, k: int) -> HomographyPair:
    file = path / f"H_1_{k}"
    try:
        text = read_regular(file, LARGEST).decode("utf-8")
    except FileNotFoundError:
        raise BadItem(f"{file}: no such homography") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadItem(f"{file} cannot be read ({reason(error)})") from None
    matrix = numbers(text.split(), (9,), str(file)).reshape(3, 3)
    if abs(np.linalg.det(matrix)) < 1e-12:
        raise BadItem(f"{file} is singular")
    return HomographyPair(
        name=f"{path.name}/1-{k}",
        source=path / "1.ppm",
        target=path / f"{k}.ppm",
        homography=matrix,
        category=_KINDS[path.name[0]],
    )
