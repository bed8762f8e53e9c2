"""Extraction over a Ray cluster: tasks read images, actors hold engines, and all actors write to one store.

Ray Data streams from the tasks to the actors. Images are read, hashed and resized on any CPU, only a few
batches ahead of the engines. (Without GPUs, Ray Data fuses both steps.) The actor that computes a map also
writes it, which is safe because maps appear whole (see `writer`); only rows of text come back. If a process
is killed, Ray gives its rows to another.

All machines must see the bundle, the images and the store under the same paths, on a shared file system.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.signing import Trust
from ditf.runtime.errors import DitfError, InputError, MissingComponent
from ditf.runtime.files.liveness import file_system_time
from ditf.runtime.files.reading import read_regular
from ditf.runtime.images import LARGEST_FILE, FittedImage, decode_image, fitted_image
from ditf.runtime.model import Model
from ditf.runtime.store.extraction import (
    Extraction,
    Pending,
    batch_size,
    failure_text,
    named,
    store_batch,
)
from ditf.runtime.store.feature_store import PARTIAL, STORE, StoreIdentity, features_hash, map_path
from ditf.runtime.store.ray_connection import cpus
from ditf.runtime.store.writer import StoreWriter

COMPUTED, KEPT, FAILED, PENDING, FATAL = "computed", "kept", "failed", "pending", "fatal"
"""The states of an image. Fatal stands for a failure that is not due to an image; it ends the run."""

_CPUS = 0.5  # CPUs of a reading task, and of an actor, so that both fit on one CPU
_TASK = 32  # the most images of a task, which are lost if the task is
_TASKS_A_WORKER = 8  # at least so many, so that all workers are busy until the end

_Columns = dict[str, Any]
"""A batch of rows as Ray Data represents it: {column: array}, all of the same length."""


@dataclass(frozen=True)
class ExtractionJob:
    """What every process of the cluster needs to know.

    Attributes:
        bundle, store: absolute paths, the same on all machines.
        trust: what every process accepts of the bundle.
        size: the size (H, W) of the engine's input in pixels.
        identity: what the store's maps have in common.
        prompt: see `Model.features`.
        fit, backend: see `ditf.runtime.load`.
        started_ns: when the run began, by the clock of the store's file system.
    """

    bundle: Path
    trust: Trust
    size: tuple[int, int]
    store: Path
    identity: StoreIdentity
    prompt: Optional[str]
    fit: str
    backend: str
    started_ns: int

    @classmethod
    def of(
        cls, bundle: Bundle, writer: StoreWriter, prompt: str | None, fit: str, backend: str
    ) -> ExtractionJob:
        """A job that starts now.

        Args:
            bundle: the opened bundle; every worker will open it in the same way.
            writer: the opened store.
        """
        signers = bundle.trust.signers
        trust = replace(bundle.trust, signers=None if signers is None else signers.resolve())
        started = file_system_time(writer.path / PARTIAL)
        store = writer.path.resolve()
        return cls(
            bundle.path.resolve(),
            trust,
            bundle.manifest.size,
            store,
            writer.identity,
            prompt,
            fit,
            backend,
            started,
        )

    def writer(self) -> StoreWriter:
        """The store's writer in this process.

        Raises:
            InputError: this machine does not see the store.
        """
        if not (self.store / STORE).is_file():
            raise InputError(
                f"{self.store} is not to be seen from {platform.node()}",
                "put the store, the images and the bundle on a file system that all machines share",
            )
        return StoreWriter(self.store, self.identity)

    def found(self, writer: StoreWriter, name: str, image_sha256: str) -> str | None:
        """KEPT if an earlier run wrote the map, COMPUTED if a lost process of this run did, else None."""
        if not writer.has(name, image_sha256):
            return None
        written = map_path(self.store, name).stat().st_mtime_ns
        return KEPT if written < self.started_ns else COMPUTED


_NOTHING: dict[str, Any] = {"image_sha256": "", "pixels": b"", "loss": 0.0}
_NOTHING |= dict.fromkeys(("height", "width", "rows", "columns"), 0)


def _fatal_as_rows(step: Callable[..., _Columns]) -> Callable[..., _Columns]:
    """Return a step's expected failures as rows, because Ray would reduce an exception to its text."""

    @functools.wraps(step)
    def careful(*arguments: Any, **options: Any) -> _Columns:
        try:
            return step(*arguments, **options)
        except DitfError as error:
            told = [error.exit_code, error.problem, error.fix]
        except OSError as error:
            told = [2, f"{platform.node()}: {error.filename or ''} {error.strerror or error}", ""]
        batch = next(one for one in arguments if isinstance(one, dict))
        rows = [{"name": str(name), "state": FATAL, "reason": json.dumps(told)} for name in batch["name"]]
        return _columns([{**row, **_NOTHING} for row in rows])

    return careful


@_fatal_as_rows
def prepare(batch: _Columns, job: ExtractionJob) -> _Columns:
    """Read images whose maps are not there yet.

    Args:
        batch: the columns `name` and `path` of images.

    Returns:
        The columns name; state; reason, for images that failed; image_sha256; pixels, the bytes at the
        engine's size; height and width of the original; rows and columns of the pixels that the image
        covers.
    """
    writer = job.writer()
    rows = []
    for name, path in zip(batch["name"], batch["path"], strict=True):
        row = {"name": str(name), "state": PENDING, "reason": "", **_NOTHING}
        try:
            content = read_regular(path, LARGEST_FILE)
            row["image_sha256"] = hashlib.sha256(content).hexdigest()
            state = job.found(writer, row["name"], row["image_sha256"])
            if state is None:
                image = fitted_image(decode_image(content, str(path)), job.size, job.fit)
                row |= {"pixels": image.pixels.tobytes(), "height": image.image_size[0]}
                row |= {"width": image.image_size[1], "rows": image.covered[0], "columns": image.covered[1]}
            else:
                row["state"] = state
        except (InputError, OSError) as error:
            row |= {"state": FAILED, "reason": failure_text(Path(path), error)}
        rows.append(row)
    return _columns(rows)


class Extractor:
    """An actor that holds an open bundle, and computes and stores the images that `prepare` has read.

    The bundle is opened with the first batch and not when the actor is made, so that a failure can be
    reported with its reason. Otherwise Ray would only report that an actor died.
    """

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job
        self._model: Model | None = None

    @_fatal_as_rows
    def __call__(self, batch: _Columns) -> _Columns:
        """Compute the pending images.

        Returns:
            The columns name, state, reason, and loss, the rounding error of the maps that were computed.
        """
        if FATAL in batch["state"]:
            return {name: batch[name] for name in ("name", "state", "reason", "loss")}
        model = self._opened()
        writer = self._job.writer()
        feeds = model.feeds(self._job.prompt)
        said = zip(batch["name"], batch["state"], batch["reason"], strict=True)
        rows = [{"name": str(n), "state": str(s), "reason": str(r), "loss": 0.0} for n, s, r in said]
        pending: list[tuple[dict[str, Any], Pending]] = []
        for index, row in enumerate(rows):
            if row["state"] == PENDING:
                one = _pending(batch, index, model.manifest.size)
                state = self._job.found(writer, one.name, one.image_sha256)
                if state is None:
                    pending.append((row, one))
                else:
                    row["state"] = state
        step = batch_size(model)
        for start in range(0, len(pending), step):
            chunk = pending[start : start + step]
            result = Extraction()
            store_batch(model, [one for _, one in chunk], writer, feeds, result)
            for row, one in chunk:
                failed = one.name in result.failed
                row |= {"state": FAILED if failed else COMPUTED, "reason": result.failed.get(one.name, "")}
                row["loss"] = result.loss
        return _columns(rows)

    def _opened(self) -> Model:
        if self._model is None:
            bundle = Bundle.open(self._job.bundle, self._job.trust)
            if features_hash(bundle) != self._job.identity.features:
                raise InputError(
                    f"{bundle.path} on {platform.node()} is another bundle", "copy it there again"
                )
            self._model = Model(bundle, self._job.backend, self._job.fit)
        return self._model


def _pending(batch: _Columns, index: int, size: tuple[int, int]) -> Pending:
    """The image in one row of the result of `prepare`."""
    height, width, rows, columns = (int(batch[n][index]) for n in ("height", "width", "rows", "columns"))
    pixels = np.frombuffer(batch["pixels"][index], np.uint8).reshape(*size, 3)
    image = FittedImage(pixels, (rows, columns), (height, width))
    return Pending(str(batch["name"][index]), str(batch["image_sha256"][index]), image)


def extract_with_ray(
    job: ExtractionJob,
    images: Sequence[Path],
    workers: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Extraction:
    """Compute the maps that a store does not have yet, on the connected cluster.

    Args:
        images: the image files; one that is listed twice is computed once.
        workers: the number of actors. The default is one for each GPU, or without GPUs one for each machine,
            because an engine uses all cores by itself. If there are more actors than GPUs, they share them.
        progress: called with the name of every image when it is done.

    Returns:
        The result. All maps that were written in this run count as computed, even if the process that wrote
        one was killed before it could report.

    Raises:
        InputError: no worker can open the bundle.
        MissingComponent: a worker lacks a component, or Ray failed.
    """
    import ray.data

    named_paths, failed = named(images)
    if not named_paths:
        return Extraction(failed=failed)
    paths = {name: str(path.absolute()) for name, path in named_paths.items()}
    gpus = float(ray.cluster_resources().get("GPU", 0))
    count = workers or int(gpus) or len([node for node in ray.nodes() if node["Alive"]])
    task = min(_TASK, max(1, -(-len(paths) // (_TASKS_A_WORKER * count))))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"name": name, "path": path} for name, path in paths.items()]
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // task))
    dataset = dataset.map_batches(
        prepare, fn_kwargs={"job": job}, batch_size=task, num_cpus=_CPUS, zero_copy_batch=True
    ).map_batches(
        Extractor,
        fn_constructor_args=(job,),
        batch_size=task,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=count, initial_size=min(count, max(1, int(cpus(ray))))
        ),
        num_cpus=_CPUS,
        num_gpus=min(1.0, gpus / count) if gpus else 0,
        zero_copy_batch=True,
    )
    states: dict[str, tuple[str, str]] = {}
    loss = 0.0
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for name, state, reason in zip(batch["name"], batch["state"], batch["reason"], strict=True):
                if state == FATAL:
                    raise expected_failure(*json.loads(str(reason)))
                states[str(name)] = (str(state), str(reason))
                progress(str(name))
            loss = max(loss, float(batch["loss"].max()))
    except ray.exceptions.RayError as error:
        line = [line for line in str(error).splitlines() if line.strip()][-1:]
        raise MissingComponent(
            f"Ray could not finish ({' '.join(line)[:200] or type(error).__name__})",
            "run it again: what is stored stays; -v shows what Ray says",
        ) from error
    return Extraction(
        computed=sum(state == COMPUTED for state, _ in states.values()),
        kept=sum(state == KEPT for state, _ in states.values()),
        failed=failed | {name: states[name][1] for name in paths if states[name][0] == FAILED},
        loss=loss,
    )


def expected_failure(code: int, problem: str, fix: str) -> DitfError:
    """Rebuild the error that another process reported, from its exit code and texts."""
    return (MissingComponent if code == MissingComponent.exit_code else InputError)(problem, fix)


def _columns(rows: Sequence[dict[str, Any]]) -> _Columns:
    """Turn rows into columns."""
    return {
        name: np.array([row[name] for row in rows], object if isinstance(rows[0][name], bytes) else None)
        for name in rows[0]
    }
