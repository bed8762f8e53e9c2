"""Features of many images into a store: what is there is kept, what fails is told, the rest is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ditf.runtime.bundle import sha256
from ditf.runtime.errors import InputError
from ditf.runtime.features import FeatureMap
from ditf.runtime.images import open_image
from ditf.runtime.model import Model
from ditf.runtime.store_writer import StoreWriter

_BATCH = 4  # of a bundle that takes any: images are held in memory


@dataclass
class Extraction:
    """What a run did.

    Attributes:
        computed, kept: maps that were written, and that were there.
        failed: why, by name.
        loss: the worst |stored - computed| / |computed| of a map.
    """

    computed: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    loss: float = 0.0


@dataclass(frozen=True)
class _Pending:
    name: str
    image_sha256: str
    image: Image.Image


def image_name(path: Path) -> str:
    """Name of an image in a store: its path as given, without detours such as "./"."""
    return Path(os.path.normpath(path)).as_posix()


def extract(
    model: Model,
    images: Sequence[Path],
    writer: StoreWriter,
    prompt: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Extraction:
    """Compute the maps that a store does not have yet.

    Args:
        images: an image twice is computed once.
        writer: opened.
        prompt: see `Model.features`.
        progress: called with the name of every image.

    Raises:
        InputError: a condition that the bundle does not have.
        OSError: the store cannot be written, on a full disk for example.
    """
    model.feeds(prompt)  # a condition that is not there is no image's failure
    paths = {image_name(path): path for path in images}
    size = model.manifest.batch if isinstance(model.manifest.batch, int) else _BATCH
    result = Extraction()
    pending: list[_Pending] = []
    for name, path in paths.items():
        progress(name)
        try:
            digest = sha256(path)
            if writer.has(name, digest):
                result.kept += 1
                continue
            pending.append(_Pending(name, digest, open_image(path)))
        except InputError as error:
            result.failed[name] = str(error)
        except OSError as error:
            result.failed[name] = f"{path} cannot be read ({error.strerror})"
        if len(pending) == size:
            _store(model, pending, writer, prompt, result)
            pending = []
    if pending:
        _store(model, pending, writer, prompt, result)
    return result


def _store(
    model: Model, pending: Sequence[_Pending], writer: StoreWriter, prompt: str | None, result: Extraction
) -> None:
    """Compute and write a batch; one image whose features cannot be had does not take the others with it."""
    try:
        maps = model.features_of([one.image for one in pending], prompt=prompt)
    except InputError as error:
        if len(pending) > 1:
            for one in pending:
                _store(model, [one], writer, prompt, result)
        else:
            result.failed[pending[0].name] = str(error)
        return
    for one, feature_map in zip(pending, maps, strict=True):
        _put(one, feature_map, writer, result)


def _put(one: _Pending, feature_map: FeatureMap, writer: StoreWriter, result: Extraction) -> None:
    try:
        loss = writer.put(one.name, one.image_sha256, feature_map)
    except InputError as error:
        result.failed[one.name] = str(error)
        return
    result.loss = max(result.loss, loss)
    result.computed += 1
