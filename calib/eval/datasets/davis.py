"""DAVIS 2017 (Pont-Tuset et al., arXiv 1704.00675): objects of the first frame are followed in a video.

    DAVIS/JPEGImages/480p/SEQUENCE/00000.jpg ...
    DAVIS/Annotations/480p/SEQUENCE/00000.png ...     palette PNG: 0 background, 1.. objects, 255 void
    DAVIS/ImageSets/2017/{val,train}.txt               the sequences of a split

The protocol is in `ditf.calib.eval.segmentation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditf.calib.eval.datasets.base import (
    BadItem,
    ImageSource,
    Reading,
    check_sizes,
    collect,
    folder,
    picture,
    read_lines,
)

SPLITS = ("val", "train")
VOID = 255


@dataclass(frozen=True)
class Video:
    """Frames of a video and the annotation of each, in order."""

    name: str
    frames: Sequence[Path]
    annotations: Sequence[Path]
    size: tuple[int, int]
    category: str = ""
    group: str = ""

    @property
    def images(self) -> Sequence[ImageSource]:
        return self.frames

    def check(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Check that all frames have the size of the first annotation; raises BadItem."""
        check_sizes(self.name, self.frames, sizes, [self.size] * len(self.frames))

    def labels(self, index: int) -> np.ndarray:
        """Labels uint8 [H, W] of a frame: 0 is background and void, 1.. are objects; raises BadItem."""
        return read_object_labels(self.annotations[index])


def read_davis(data: Path, split: str) -> Reading:
    """Read the videos of a split, in the order of its list.

    Raises:
        InputError: the dataset is missing or the split is empty.
    """
    for part in ("JPEGImages", "Annotations"):
        folder(data / part / "480p")
    names = read_lines(data / "ImageSets" / "2017" / f"{split}.txt")
    return collect(names, lambda name: _read_video(data, name))


def _read_video(data: Path, name: str) -> Video:
    frames, annotations = (
        sorted((data / part / "480p" / name).glob(pattern))
        for part, pattern in (("JPEGImages", "*.jpg"), ("Annotations", "*.png"))
    )
    if len(frames) < 3:
        raise BadItem(f"{data / 'JPEGImages' / '480p' / name}: {len(frames)} frames, 3 are the fewest scored")
    if [path.stem for path in frames] != [path.stem for path in annotations]:
        raise BadItem(f"{name}: {len(frames)} frames, {len(annotations)} annotations, not of the same names")
    labels = [read_object_labels(path) for path in annotations]
    if labels[0].max() == 0:
        raise BadItem(f"{annotations[0]} has no object")
    if any(one.shape != labels[0].shape for one in labels):
        raise BadItem(f"{name}: annotations of different sizes")
    height, width = labels[0].shape
    return Video(name, frames, annotations, (height, width))


def read_object_labels(path: Path) -> np.ndarray:
    """Labels uint8 [H, W] of an annotation, with void as background; raises BadItem."""
    with picture(path) as image:
        mode, labels = image.mode, np.array(image)
    if mode not in ("P", "L"):
        raise BadItem(f"{path} is a {mode} image; an annotation has a palette")
    labels[labels == VOID] = 0
    return labels
