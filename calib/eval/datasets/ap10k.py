"""AP-10K (Yu et al., NeurIPS 2021) as GeoAware-SC (Zhang et al., CVPR 2024) prepares it for correspondence.

    ap-10k/ImageAnnotation/FAMILY/SPECIES/NUMBER.json    COCO style: keypoints [x, y, v] * 17,
                                                         bbox [x, y, w, h], width, height
    ap-10k/JPEGImages/FAMILY/SPECIES/NUMBER.jpg
    ap-10k/PairAnnotation/{test,val,trn}/SOURCE-TARGET:SPECIES.json          src_json_path, trg_json_path
    ap-10k/PairAnnotation/{test,val}_cross_species/SOURCE-TARGET:FAMILY.json
    ap-10k/PairAnnotation/{test,val}_cross_family/SOURCE-TARGET:all.json

which is what its prepare_ap10k.ipynb writes. A split is read in up to three settings: intra-species,
cross-species, cross-family.

Protocol (its utils_dataset.py and pck_train.py): keypoints whose visibility is not 0 in both images; correct
where the distance is *less than* alpha * max(width, height of the target's bbox). It measures in images
padded to a square of 840 px, here in the original pixels: the ratio is the same. (It multiplies keypoints
with half of their visibility, which moves those of visibility 1; here they stay where they were annotated.)
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ditf.calib.eval.datasets.base import (
    BadItem,
    Box,
    Pair,
    Reading,
    collect,
    folder,
    numbers,
    read_annotation,
)
from ditf.runtime.errors import InputError

SPLITS = ("test", "val", "trn")
SETTINGS = {"intra-species": "", "cross-species": "_cross_species", "cross-family": "_cross_family"}
KEYPOINTS = (
    "left eye", "right eye", "nose", "neck", "root of tail",
    "left shoulder", "left elbow", "left front paw", "right shoulder", "right elbow", "right front paw",
    "left hip", "left knee", "left back paw", "right hip", "right knee", "right back paw",
)  # fmt: skip


def read_ap10k(data: Path, split: str) -> Reading:
    """Read the pairs of a split in every available setting, sorted by file name in each.

    Raises:
        InputError: the dataset is missing or the split is empty.
    """
    pairs = folder(data / "PairAnnotation")
    files = [
        (setting, path)
        for setting, ending in SETTINGS.items()
        for path in sorted((pairs / f"{split}{ending}").glob("*.json"))
    ]
    if not files:
        raise InputError(f"{pairs / split} holds no pairs", "docs/eval.md says how they are made")
    return collect(files, lambda entry: _read_pair(data, *entry))


def _read_pair(data: Path, setting: str, path: Path) -> Pair:
    document = read_annotation(path)
    source, target = (_Annotated(data, path, document.get(key)) for key in ("src_json_path", "trg_json_path"))
    seen = (source.points[:, 2] > 0) & (target.points[:, 2] > 0)
    return Pair(
        name=path.stem if setting == "intra-species" else f"{setting}:{path.stem}",
        source=source.image,
        target=target.image,
        points=source.points[seen, :2],
        truth=target.points[seen, :2],
        box=target.box,
        category=path.stem.rpartition(":")[2],
        keypoints=[name for name, both in zip(KEYPOINTS, seen, strict=True) if both],
        group=setting,
        sizes=(source.size, target.size),
    )


class _Annotated:
    """One image's annotation."""

    def __init__(self, data: Path, pair: Path, name: Any) -> None:
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if "ImageAnnotation" not in parts:
            raise BadItem(f"{pair} names no file in ImageAnnotation")
        below = Path(*parts[parts.index("ImageAnnotation") + 1 :])
        path = data / "ImageAnnotation" / below
        document = read_annotation(path)
        flat = numbers(document.get("keypoints"), (3 * len(KEYPOINTS),), f"{path}: keypoints")
        x, y, width, height = (float(v) for v in numbers(document.get("bbox"), (4,), f"{path}: bbox"))
        size = numbers([document.get("height"), document.get("width")], (2,), f"{path}: size")
        self.image = data / "JPEGImages" / below.with_suffix(".jpg")
        self.points: np.ndarray = flat.reshape(-1, 3)
        self.box: Box = (x, y, x + width, y + height)
        self.size = (int(size[0]), int(size[1]))
