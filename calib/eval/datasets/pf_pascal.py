"""PF-PASCAL (Ham et al., Proposal Flow, TPAMI 2018): 20 categories, 299 test pairs by SCNet's split.

    PF-dataset-PASCAL/JPEGImages/NAME.jpg
    PF-dataset-PASCAL/Annotations/CATEGORY/NAME.mat    kps [K, 2], NaN where a keypoint is not seen
    PF-dataset-PASCAL/{test,val,train}_pairs_pf_pascal.csv     or {test,val,trn}_pairs.csv

The lists are Weakalign's and NC-Net's (source_image, target_image, class 1..20, then for the test split XA,
YA, XB, YB, numbers joined by ";"), or Hyperpixel Flow's (without points). Where a list has no points they
come from the .mat files (SciPy), and those that both images have are used, as Hyperpixel Flow's
data/pfpascal.py does.

Protocol (Hyperpixel Flow, DHPF, CATs: threshold "img", torch.le): correct where the distance is at most
alpha * max(height, width of the target image). The field's figure is the mean per image. NC-Net resizes both
images to 224x224 first and GeoAware-SC pads to a square, which is the same threshold for square images only,
and there is compared with `<`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditf.calib.eval.datasets.base import (
    BadItem,
    Pair,
    Reading,
    collect,
    folder,
    header_size,
    numbers,
    read_table,
    reason,
)
from ditf.runtime.errors import InputError, missing_extra
from ditf.runtime.files.reading import read_regular

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

SPLITS = ("test", "val", "trn")
_LARGEST_ANNOTATION = 16 << 10  # bytes: they hold tens of numbers, and may inflate a thousandfold
_LISTS = {"test": ("test",), "val": ("val",), "trn": ("trn", "train")}


def read_pf_pascal(data: Path, split: str) -> Reading:
    """Read the pairs of a split, in the order of its list.

    Raises:
        InputError: the dataset or the list is missing, or the list is empty.
        MissingComponent: the list has no points and SciPy, which reads .mat files, is not installed.
    """
    images = folder(data / "JPEGImages")
    candidates = [
        data / f"{name}_pairs{ending}.csv" for name in _LISTS[split] for ending in ("_pf_pascal", "")
    ]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise InputError(f"{candidates[0]}: no such list of pairs", "docs/eval.md has the layout")
    rows = list(enumerate(read_table(path), 2))
    if any(len(row) < 7 for _, row in rows):
        _scipy()
    return collect(rows, lambda row: _read_pair(data, images, path, *row))


def _read_pair(data: Path, images: Path, path: Path, line: int, row: list[str]) -> Pair:
    where = f"{path}, line {line}"
    try:
        category = CATEGORIES[int(float(row[2])) - 1]
        if float(row[2]) < 1:
            raise IndexError
    except (IndexError, ValueError):
        raise BadItem(f"{where} has no class of 1 to {len(CATEGORIES)}") from None
    source, target = (images / Path(name).name for name in row[:2])
    if len(row) >= 7:
        points, truth = (
            np.stack([_joined(row[column], where), _joined(row[column + 1], where)], axis=1)
            if row[column].count(";") == row[column + 1].count(";")
            else _unequal(where)
            for column in (3, 5)
        )
        names = [str(index) for index in range(len(points))]
        if len(points) != len(truth):
            _unequal(where)
    else:
        one, other = (_annotation(data, category, name.stem) for name in (source, target))
        if len(one) != len(other):
            raise BadItem(f"{where}: {len(one)} and {len(other)} keypoints")
        both = np.isfinite(one).all(axis=1) & np.isfinite(other).all(axis=1)
        points, truth = one[both], other[both]
        names = [str(index) for index in np.flatnonzero(both)]
    height, width = header_size(target)
    return Pair(
        name=f"{source.stem}-{target.stem}:{category}",
        source=source,
        target=target,
        points=points,
        truth=truth,
        box=(0.0, 0.0, float(width), float(height)),
        category=category,
        keypoints=names,
    )


def _joined(text: str, where: str) -> np.ndarray:
    """Parse numbers joined by ";"."""
    return numbers([part for part in text.split(";") if part.strip()], (-1,), where)


def _unequal(where: str) -> np.ndarray:
    raise BadItem(f"{where} has not as many x as y, or not as many points in the target")


def _annotation(data: Path, category: str, stem: str) -> np.ndarray:
    """Keypoints [K, 2] of an image; invisible ones are NaN."""
    path = data / "Annotations" / category / f"{stem}.mat"
    if not path.exists():
        raise BadItem(f"{path}: no such annotation")
    try:
        content = read_regular(path, _LARGEST_ANNOTATION)
        document: Mapping[str, Any] = _scipy().loadmat(io.BytesIO(content))
        points = np.asarray(document["kps"], dtype=np.float64)
    except (
        Exception
    ) as error:  # SciPy has no class of its own: zlib, struct, Value, Type, Key errors and more
        raise BadItem(f"{path} is not a .mat file with kps ({reason(error)})") from None
    if points.ndim != 2 or points.shape[1] != 2:
        raise BadItem(f"{path}: kps has shape {list(points.shape)}")
    return points


def _scipy() -> Any:
    try:
        import scipy.io
    except ImportError:
        raise missing_extra("scipy", "eval") from None
    return scipy.io
