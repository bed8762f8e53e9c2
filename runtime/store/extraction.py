"""Computing the features of many images into a store. Maps that exist are kept, and failures are reported."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ditf.runtime.bundles.conditions import Feeds
from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.files.reading import read_regular
from ditf.runtime.images import LARGEST_FILE, FittedImage, decode_image
from ditf.runtime.model import Model
from ditf.runtime.store.writer import StoreWriter

_BATCH = 4  # for a bundle that takes any batch; images are held in memory


@dataclass
class Extraction:
    """The result of a run.

    Attributes:
        computed: the number of maps that were written.
        kept: the number of maps that existed already.
        failed: the reason of each failure, by image name.
        loss: the largest |stored - computed| / |computed| of a map.
    """

    computed: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    loss: float = 0.0


@dataclass(frozen=True)
class Pending:
    """An image that has been read: its name, its file's hash, and its pixels at the engine's size."""

    name: str
    image_sha256: str
    image: FittedImage


def image_name(path: Path) -> str:
    """The name of an image in a store: its path as given, without detours such as "./"."""
    return Path(os.path.normpath(path)).as_posix()


def named(images: Sequence[Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """Images by name; and, by name, the reason for each image whose name a store cannot hold."""
    paths = {image_name(path): path for path in images}
    failed = {}
    for name, path in paths.items():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            failed[name] = f"{path}: its name is not UTF-8; rename it"
    return {name: path for name, path in paths.items() if name not in failed}, failed


def extract(
    model: Model,
    images: Sequence[Path],
    writer: StoreWriter,
    prompt: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Extraction:
    """Compute the maps that a store does not have yet.

    Args:
        images: the image files; one that is listed twice is computed once.
        writer: the opened store.
        prompt: see `Model.features`.
        progress: called with the name of every image.

    Raises:
        InputError: the bundle does not have the condition.
        OSError: the store cannot be written, for example because the disk is full.
    """
    feeds = model.feeds(prompt)  # a missing condition ends the run, since it is no failure of an image
    paths, failed = named(images)
    size = batch_size(model)
    result = Extraction(failed=failed)
    pending: list[Pending] = []
    for name, path in paths.items():
        progress(name)
        try:
            content = read_regular(path, LARGEST_FILE)
            digest = hashlib.sha256(content).hexdigest()
            if writer.has(name, digest):
                result.kept += 1
                continue
            pending.append(Pending(name, digest, model.fitted(decode_image(content, str(path)))))
        except (InputError, OSError) as error:
            result.failed[name] = failure_text(path, error)
        if len(pending) == size:
            store_batch(model, pending, writer, feeds, result)
            pending = []
    store_batch(model, pending, writer, feeds, result)
    return result


def batch_size(model: Model) -> int:
    """The number of images to compute at a time."""
    return model.manifest.batch if isinstance(model.manifest.batch, int) else _BATCH


def failure_text(path: Path, error: InputError | OSError) -> str:
    """The reason why an image could not be read, for people."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such image"
    return f"{path} cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


def store_batch(
    model: Model, pending: Sequence[Pending], writer: StoreWriter, feeds: Feeds, result: Extraction
) -> None:
    """Compute and write a batch. If an image's features cannot be computed, only that image fails.

    Args:
        feeds: the result of `Model.feeds`.
        result: is updated.
    """
    try:
        maps = model.features_of_fitted([one.image for one in pending], feeds)
    except InputError as error:
        if len(pending) > 1:
            for one in pending:
                store_batch(model, [one], writer, feeds, result)
        else:
            result.failed[pending[0].name] = str(error)
        return
    for one, feature_map in zip(pending, maps, strict=True):
        _put(one, feature_map, writer, result)


def _put(one: Pending, feature_map: FeatureMap, writer: StoreWriter, result: Extraction) -> None:
    try:
        loss = writer.put(one.name, one.image_sha256, feature_map)
    except InputError as error:
        result.failed[one.name] = str(error)
        return
    result.loss = max(result.loss, loss)
    result.computed += 1
