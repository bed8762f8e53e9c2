"""The worker: one thread owns the engines, requests queue for it, and images are run in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ditf.runtime.errors import InputError
from ditf.runtime.feature_cache import FeatureCache
from ditf.runtime.features import FeatureMap
from ditf.runtime.images import FittedImage
from ditf.runtime.model import Model
from ditf.runtime.serving.errors import EngineError, Overloaded
from ditf.runtime.serving.jobs import ImageJob, Job, Observer, SlicedJob, Ticket

logger = logging.getLogger("ditf.serve")

T = TypeVar("T")


class Worker:
    """The thread that runs the models, and the queues of what waits for it.

    Images for the same bundle and condition are run together, as soon as a batch is full or the oldest has
    waited for `delay_s`. Work that follows features, above all matching, goes first because it ends a
    request. It runs in slices, and between two slices other waiting work has a turn.

    Args:
        models: the models by bundle name. Only this thread uses them, and they are closed with it.
        cache: the cache that features go to.
        images: the most images that may wait.
        delay_s: how long an image waits for others, in seconds.
        largest_batch: the largest batch of bundles that take any number of images.
        observer: is told about stages, batches and failures.

    Attributes:
        running: whether something is being run.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        cache: FeatureCache,
        images: int,
        delay_s: float,
        largest_batch: int,
        observer: Observer,
    ) -> None:
        self._models = models
        self._cache = cache
        self._room = images
        self._delay = delay_s
        self._largest = {name: model.largest_batch or largest_batch for name, model in models.items()}
        self._observer = observer
        self._images: deque[ImageJob] = deque()
        self._calls: deque[SlicedJob] = deque()
        self._begun: deque[SlicedJob] = deque()
        self._others_turn = True
        self._changed = threading.Condition()
        self._closing = False
        self.running = False
        self._thread = threading.Thread(target=self._work, name="ditf-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of images and calls that wait."""
        return len(self._images) + len(self._calls) + len(self._begun)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def features(
        self,
        bundle: str,
        prompt: str | None,
        images: Sequence[tuple[bytes, FittedImage]],
        ticket: Ticket,
    ) -> list[Future[FeatureMap]]:
        """Queue images, either all or none of them.

        Args:
            images: the images, each with its key in the cache.

        Raises:
            Overloaded: they do not all fit into the queue.
        """
        jobs = [ImageJob(ticket, bundle=bundle, prompt=prompt, key=key, image=image) for key, image in images]
        with self._changed:
            if len(self._images) + len(jobs) > self._room:
                self._images = deque(job for job in self._images if not job.future.cancelled())
            if self._closing or len(self._images) + len(jobs) > self._room:
                raise Overloaded("the queue is full", "try again")
            self._images.extend(jobs)
            self._changed.notify()
        return [job.future for job in jobs]

    def call(self, stage: str, slices: Iterator[T], ticket: Ticket) -> Future[list[T]]:
        """Queue other work that uses a model, for a request that has been let in.

        Args:
            slices: the worker's thread runs its steps, and does other work between two of them.

        Returns:
            The results of the steps, in order.

        Raises:
            Overloaded: the worker is closing.
        """
        job = SlicedJob(ticket, stage=stage, slices=slices)
        with self._changed:
            if self._closing:
                raise Overloaded("the server is stopping", "try again")
            self._calls.append(job)
            self._changed.notify()
        return job.future

    def close(self, timeout_s: float) -> bool:
        """Cancel what waits, let what runs end and close the models; False if it did not end in time."""
        with self._changed:
            self._closing = True
            left: list[Job[Any]] = [*self._images, *self._calls, *self._begun]
            for queue in (self._images, self._calls, self._begun):
                queue.clear()
            self._changed.notify()
        for job in left:
            job.future.cancel()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        for model in self._models.values():
            model.close()
        return True

    def _work(self) -> None:
        while True:
            batch = self._next()
            if batch is None:
                return
            self.running = True
            try:
                if isinstance(batch, SlicedJob):
                    self._run_slice(batch)
                else:
                    self._run_images(batch)
            except Exception:  # the thread serves all requests, so nothing may end it
                logger.exception("the worker failed")
                for job in [batch] if isinstance(batch, SlicedJob) else batch:
                    if not job.future.done():
                        job.fail(EngineError("the worker failed", "see the server's log"))
            finally:
                self.running = False

    def _next(self) -> SlicedJob | list[ImageJob] | None:
        """Wait for what to run next and return it; None when the worker closes."""
        with self._changed:
            while True:
                if self._begun and not self._others_turn:
                    self._others_turn = True
                    return self._begun.popleft()
                self._others_turn = False
                if self._calls:
                    return self._calls.popleft()
                wait = None
                if self._images:
                    first = self._images[0]
                    largest = self._largest[first.bundle]
                    batch = [job for job in self._images if _together(first, job)][:largest]
                    wait = first.arrived + self._delay - time.monotonic()
                    if len(batch) == largest or wait <= 0:
                        taken = set(map(id, batch))
                        self._images = deque(job for job in self._images if id(job) not in taken)
                        return batch
                elif self._closing:
                    return None
                if self._begun:
                    self._others_turn = True
                    return self._begun.popleft()
                self._changed.wait(wait)

    def _run_slice(self, job: SlicedJob) -> None:
        if not job.wanted():
            return
        start = time.monotonic()
        if not job.results:
            self._observer.stage("queue", start - job.arrived)
        try:
            job.results.append(next(job.slices))
        except StopIteration:
            self._observer.stage(job.stage, job.seconds)
            job.succeed(job.results)
            return
        except InputError as error:
            job.fail(error)
            return
        except Exception as error:
            job.fail(self._failed(error, [job]))
            return
        job.seconds += time.monotonic() - start
        with self._changed:
            if not self._closing:
                self._begun.append(job)
                return
        job.future.cancel()

    def _run_images(self, jobs: Sequence[ImageJob]) -> None:
        wanted: dict[bytes, list[ImageJob]] = {}
        for job in jobs:
            if not job.wanted():
                continue
            self._observer.stage("queue", time.monotonic() - job.arrived)
            kept = self._cache.get(job.key)  # another request may have computed it in the meantime
            if kept is not None:
                job.succeed(kept)
            else:
                wanted.setdefault(job.key, []).append(job)
        if wanted:
            self._compute(list(wanted.values()))

    def _compute(self, groups: Sequence[Sequence[ImageJob]]) -> None:
        """Compute the features of one image per group. If a batch fails, its images are run one by one."""
        first = groups[0][0]
        model = self._models[first.bundle]
        start = time.monotonic()
        self._observer.batch(len(groups))
        try:
            images = [group[0].image for group in groups if group[0].image is not None]
            maps = model.features_of_fitted(images, model.feeds(first.prompt))
        except Exception as error:
            if len(groups) > 1:
                for group in groups:
                    self._compute([group])
                return
            failure = self._failed(error, groups[0])
            for job in groups[0]:
                job.fail(failure)
            return
        self._observer.stage("features", time.monotonic() - start)
        for group, features in zip(groups, maps, strict=True):
            features = self._cache.put(group[0].key, features, len(groups))
            for job in group:
                job.succeed(features)

    def _failed(self, error: Exception, jobs: Sequence[Job[Any]]) -> EngineError:
        ids = [job.ticket.request_id for job in jobs]
        self._observer.engine_failed()
        logger.error("the engine failed", exc_info=error, extra={"fields": {"request_ids": ids}})
        # The error's text names files of this machine, so it only goes to the log.
        return EngineError("the engine failed on this request", f"the server's log says why, at {ids[0]}")


def _together(first: ImageJob, job: ImageJob) -> bool:
    return job.bundle == first.bundle and job.prompt == first.prompt
