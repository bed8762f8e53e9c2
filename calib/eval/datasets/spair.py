"""SPair-71k (Min et al., arXiv 1908.10543): 18 categories, test split of 12,234 pairs.

    SPair-71k/JPEGImages/CATEGORY/NAME.jpg
    SPair-71k/PairAnnotation/{trn,val,test}/NUMBER-SOURCE-TARGET:CATEGORY.json
    SPair-71k/Layout/large/{trn,val,test}.txt     the pairs of a split, a line each

An annotation has src_imname, trg_imname, category, src_imsize and trg_imsize [W, H, channels], src_kps and
trg_kps [[x, y], ...] of the same length, kps_ids, src_bndbox and trg_bndbox [x0, y0, x1, y1].

Protocol (DiTF's eval_spair.py): the features of both images are upsampled to the original images, a source
keypoint is an integer pixel, the match is the argmax over all target pixels, correct where distance /
max(height, width of trg_bndbox) <= alpha. Per point, and per image; over all, and the mean of the
categories.
"""

from __future__ import annotations

from pathlib import Path

from ditf.calib.eval.datasets.base import (
    BadItem,
    Pair,
    Reading,
    collect,
    folder,
    numbers,
    read_annotation,
    read_lines,
)
from ditf.runtime.errors import InputError

SPLITS = ("test", "val", "trn")


def read_spair(data: Path, split: str) -> Reading:
    """Read the pairs of a split, in the order of its list.

    Raises:
        InputError: the dataset is missing or the split is empty.
    """
    annotations = folder(data / "PairAnnotation" / split)
    layout = data / "Layout" / "large" / f"{split}.txt"
    if layout.exists():
        names = read_lines(layout)
    else:
        names = sorted(path.stem for path in annotations.glob("*.json"))
    if not names:
        raise InputError(f"{annotations} holds no pairs")
    return collect(names, lambda name: _read_pair(data, annotations / f"{name}.json"))


def _read_pair(data: Path, path: Path) -> Pair:
    document = read_annotation(path)
    category, source, target = (document.get(key) for key in ("category", "src_imname", "trg_imname"))
    if not all(isinstance(text, str) and text for text in (category, source, target)):
        raise BadItem(f"{path} lacks category, src_imname or trg_imname")
    points, truth = (numbers(document.get(key), (-1, 2), f"{path}: {key}") for key in ("src_kps", "trg_kps"))
    if len(points) != len(truth):
        raise BadItem(f"{path}: {len(points)} keypoints in the source, {len(truth)} in the target")
    box = numbers(document.get("trg_bndbox"), (4,), f"{path}: trg_bndbox")
    one, other = (numbers(document.get(key), (3,), f"{path}: {key}") for key in ("src_imsize", "trg_imsize"))
    names = document.get("kps_ids")
    if not isinstance(names, list) or len(names) != len(points):
        names = list(range(len(points)))
    images = data / "JPEGImages" / str(category)
    return Pair(
        name=path.stem,
        source=images / str(source),
        target=images / str(target),
        points=points,
        truth=truth,
        box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        category=str(category),
        keypoints=[str(name) for name in names],
        sizes=((int(one[1]), int(one[0])), (int(other[1]), int(other[0]))),
    )
