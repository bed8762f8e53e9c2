"""What the readers of the benchmarks share: items, and the reasons why an item cannot be used.

Images are read as the published evaluations read them, `Image.open(path).convert("RGB")`. An EXIF rotation is
not applied, because annotations refer to the stored pixels. Coordinates are (x, y) in pixels of the original
images, with centres at integers; no reader resizes anything.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, Union

import numpy as np
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.files.json_file import read_json
from ditf.runtime.files.reading import open_regular, read_regular

ImageSource = Union[Path, np.ndarray]
"""A file, or RGB uint8 [H, W, 3]."""

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1), pixels."""

LARGEST = 64 << 20  # bytes of one file of a benchmark

BORDER = 1.0  # px that a keypoint may be outside its image: annotations are rounded, some count from 1


class BadItem(Exception):
    """An item cannot be used; the message names the file and the reason."""


class Item(Protocol):
    """One unit of a benchmark, of any kind."""

    @property
    def name(self) -> str: ...

    @property
    def category(self) -> str: ...

    @property
    def images(self) -> Sequence[ImageSource]:
        """All images that the item reads."""

    def check(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Compare the annotation with the (H, W) of `images`; raises BadItem."""


@dataclass(frozen=True)
class Pair:
    """Two images and corresponding points.

    Attributes:
        name: name of the pair, unique in its benchmark.
        source, target: the images.
        points: float64 [K, 2] in the source.
        truth: float64 [K, 2] in the target.
        box: the object in the target or the whole target; alpha is a share of its longer side.
        category: category of the pair.
        keypoints: names of the K points.
        group: the setting of the benchmark, if it has several.
        sizes: (H, W) of source and target by the annotation, or None if it gives none.
    """

    name: str
    source: ImageSource
    target: ImageSource
    points: np.ndarray
    truth: np.ndarray
    box: Box
    category: str
    keypoints: Sequence[str]
    group: str = ""
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None

    @property
    def images(self) -> tuple[ImageSource, ImageSource]:
        return self.source, self.target

    @property
    def reference(self) -> float:
        """Longer side of the box, px."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])

    def check(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Check that the sizes are those of the annotation and that the points are inside.

        Raises:
            BadItem: the size differs from the annotation, the box is degenerate, there are no points, or a
                point is not finite or more than a pixel outside its image.
        """
        if self.sizes is not None:
            check_sizes(self.name, self.images, sizes, self.sizes)
        if len(self.points) == 0:
            raise BadItem(f"{self.name}: no keypoint is in both images")
        if not np.isfinite(self.box).all() or self.reference <= 0:
            raise BadItem(f"{self.name}: the target's box {self.box} is degenerate")
        for points, (height, width), which in zip((self.points, self.truth), sizes, _ENDS, strict=True):
            inside = (points >= -BORDER).all(axis=1) & (points[:, 0] < width + BORDER)
            inside &= points[:, 1] < height + BORDER  # False for NaN
            if not inside.all():
                x, y = points[np.flatnonzero(~inside)[0]]
                raise BadItem(
                    f"{self.name}: keypoint {x:g},{y:g} is outside the {which} of {width}x{height} pixels"
                )

    def queries(self, size: tuple[int, int]) -> np.ndarray:
        """The source points as DiTF queries them: whole pixels inside an image of size (H, W), [K, 2]."""
        return np.clip(np.rint(self.points), 0, (size[1] - 1, size[0] - 1))


_ENDS = ("source", "target")


def check_sizes(
    name: str,
    images: Sequence[ImageSource],
    sizes: Sequence[tuple[int, int]],
    wanted: Sequence[tuple[int, int]],
) -> None:
    """Check that images have the (H, W) of their annotation; raises BadItem."""
    for image, (height, width), (rows, columns) in zip(images, sizes, wanted, strict=True):
        if (height, width) != (rows, columns):
            what = image.name if isinstance(image, Path) else "the image"
            raise BadItem(f"{name}: {what} is {width}x{height}, its annotation is for {columns}x{rows}")


ItemT = TypeVar("ItemT", bound=Item)


@dataclass
class Reading:
    """The items of a benchmark.

    Attributes:
        items: the usable items, in the benchmark's order.
        problems: {problem: number of items that it makes unusable}.
    """

    items: Sequence[Any]
    problems: dict[str, int] = field(default_factory=dict)

    def add(self, problem: str) -> None:
        """Count one more item that has this problem."""
        self.problems[problem] = self.problems.get(problem, 0) + 1

    @property
    def lost(self) -> int:
        """Number of unusable items."""
        return sum(self.problems.values())


def collect(names: Iterable[Any], read: Callable[[Any], ItemT]) -> Reading:
    """Read one item per name and count those that raise BadItem."""
    items: list[ItemT] = []
    reading = Reading(items)
    for name in names:
        try:
            items.append(read(name))
        except BadItem as error:
            reading.add(str(error))
    return reading


def check_images(reading: Reading, report: Callable[[int, int], None] = lambda done, total: None) -> Reading:
    """Decode every image once and leave out items whose images are missing, damaged or of another size.

    Args:
        report: called with the number of items done and the number of all items.
    """
    sizes: dict[Path, tuple[int, int] | str] = {}
    kept: list[Any] = []
    checked = Reading(kept, dict(reading.problems))
    for index, item in enumerate(reading.items):
        report(index, len(reading.items))
        try:
            item.check([_size(image, sizes) for image in item.images])
            kept.append(item)
        except BadItem as error:
            checked.add(str(error))
    return checked


def _size(image: ImageSource, known: dict[Path, tuple[int, int] | str]) -> tuple[int, int]:
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    if image not in known:
        try:
            pixels = read_image(image)
            known[image] = pixels.shape[0], pixels.shape[1]
        except InputError as error:
            known[image] = error.problem
    found = known[image]
    if isinstance(found, str):
        raise BadItem(found)
    return found


def read_image(source: ImageSource) -> np.ndarray:
    """The stored pixels as RGB uint8 [H, W, 3].

    Raises:
        InputError: missing, not an image, or truncated.
    """
    if isinstance(source, np.ndarray):
        return source
    try:
        with picture(source) as image:
            if image.mode[0] in "IF":  # convert() would cut every value above 255 to white
                raise BadItem(f"{source} has more than 8 bits a pixel")
            return np.asarray(image.convert("RGB"))
    except BadItem as error:
        raise InputError(str(error)) from None


@contextmanager
def picture(path: Path) -> Iterator[Image.Image]:
    """Open an image file; raises BadItem, also for errors of decoding it in the body."""
    try:
        with open_regular(path, LARGEST) as file, Image.open(file) as image:
            yield image
    except BadItem:
        raise
    except FileNotFoundError:
        raise BadItem(f"{path}: no such image") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise BadItem(f"{path} is not a readable image ({reason(error)})") from None


def header_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image file by its header; raises BadItem."""
    with picture(path) as image:
        return image.height, image.width


def reason(error: Exception) -> str:
    """The message of an exception, shortened."""
    return str(getattr(error, "strerror", None) or error)[:80]


def read_annotation(path: Path) -> dict[str, Any]:
    """Read an annotation, a JSON object; raises BadItem."""
    try:
        document = read_json(path, LARGEST)
    except FileNotFoundError:
        raise BadItem(f"{path}: no such annotation") from None
    except (OSError, ValueError) as error:
        raise BadItem(f"{path} is not JSON ({reason(error)})") from None
    if not isinstance(document, dict):
        raise BadItem(f"{path} is not a JSON object")
    return document


def numbers(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Convert a value to finite float64 of a shape, in which -1 stands for any length.

    Raises:
        BadItem: the value is missing, not numeric, of another shape, NaN or infinite.
    """
    if value is None:
        raise BadItem(f"{where} is missing")
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise BadItem(f"{where} is not numbers") from None
    if array.size == 0 and shape[0] == -1:
        array = array.reshape((0, *shape[1:]))
    fits = array.ndim == len(shape) and all(w in (-1, n) for n, w in zip(array.shape, shape, strict=True))
    if not fits:
        raise BadItem(f"{where} has shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise BadItem(f"{where} holds NaN or infinity")
    return array


def read_table(path: Path) -> list[list[str]]:
    """The rows of a CSV file after its header.

    Raises:
        InputError: the file does not exist, is not text, or is empty.
    """
    try:
        text = read_regular(path, LARGEST).decode("utf-8")
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except FileNotFoundError:
        raise InputError(f"{path}: no such list of pairs", "docs/eval.md has the layout") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV file ({reason(error)})") from None
    if len(rows) < 2:
        raise InputError(f"{path} lists no pairs")
    return rows[1:]


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a list.

    Raises:
        InputError: the file does not exist, is not text, or is empty.
    """
    try:
        lines = [
            line.strip() for line in read_regular(path, LARGEST).decode("utf-8").splitlines() if line.strip()
        ]
    except FileNotFoundError:
        raise InputError(f"{path}: no such list", "docs/eval.md has the layout") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from None
    if not lines:
        raise InputError(f"{path} is empty")
    return lines


def folder(path: Path) -> Path:
    """Check that a folder of a dataset exists and return it.

    Raises:
        InputError: the folder does not exist.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not there", "docs/eval.md has the layout")
    return path
