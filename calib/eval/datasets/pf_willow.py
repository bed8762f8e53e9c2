"""PF-WILLOW (Ham et al., Proposal Flow, CVPR 2016): 10 categories, 900 pairs of 10 keypoints.

    PF-dataset/CATEGORY/NAME.png
    PF-dataset/test_pairs_pf.csv        (Hyperpixel Flow's copy: PF-WILLOW/test_pairs.csv)

A row of the list: imageA, imageB (PF-dataset/CATEGORY/NAME.png), XA1..XA10, YA1..YA10, XB1..XB10, YB1..YB10.

Protocol (Hyperpixel Flow's data/pfwillow.py, "bbox", torch.le; DHPF and CATs alike): the object's box is
that of the target's keypoints, correct where the distance is at most alpha * max(its height, its width). The
field's figure is the mean per image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditf.calib.eval.datasets.base import BadItem, Pair, Reading, collect, folder, numbers, read_table
from ditf.runtime.errors import InputError

SPLITS = ("test",)
_LISTS = ("test_pairs_pf.csv", "test_pairs.csv")
_KEYPOINTS = 10


def read_pf_willow(data: Path, split: str) -> Reading:
    """Read the test pairs, in the order of the list.

    Raises:
        InputError: the dataset or the list is missing.
    """
    folder(data)
    path = next((data / name for name in _LISTS if (data / name).exists()), None)
    if path is None:
        raise InputError(f"{data / _LISTS[0]}: no such list of pairs", "docs/eval.md has the layout")
    return collect(enumerate(read_table(path), 2), lambda row: _read_pair(data, path, *row))


def _read_pair(data: Path, path: Path, line: int, row: list[str]) -> Pair:
    where = f"{path}, line {line}"
    if len(row) != 2 + 4 * _KEYPOINTS:
        raise BadItem(f"{where} has {len(row)} columns instead of {2 + 4 * _KEYPOINTS}")
    names = [Path(name) for name in row[:2]]
    source, target = (data / name.parent.name / name.name for name in names)
    xa, ya, xb, yb = numbers(row[2:], (4 * _KEYPOINTS,), where).reshape(4, _KEYPOINTS)
    truth = np.stack([xb, yb], axis=1)
    (x0, y0), (x1, y1) = truth.min(axis=0), truth.max(axis=0)
    category = names[0].parent.name
    return Pair(
        name=f"{source.stem}-{target.stem}:{category}",
        source=source,
        target=target,
        points=np.stack([xa, ya], axis=1),
        truth=truth,
        box=(float(x0), float(y0), float(x1), float(y1)),
        category=category,
        keypoints=[str(index + 1) for index in range(_KEYPOINTS)],
    )
