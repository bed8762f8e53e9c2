"""What a server does for requests of all routes: it turns images into features, and features into matches."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, Union

import numpy as np

from ditf.runtime.errors import InputError
from ditf.runtime.feature_cache import FeatureCache, image_key
from ditf.runtime.features import FeatureMap
from ditf.runtime.images import FittedImage
from ditf.runtime.matching.points import CHUNK, Matches, PointsLike, check_points
from ditf.runtime.matching.soft_argmax import check_method
from ditf.runtime.model import Model
from ditf.runtime.serving.batching import Worker
from ditf.runtime.serving.decoding import check_size, decode_upload
from ditf.runtime.serving.errors import DeadlineExceeded, NotFound, TooLarge
from ditf.runtime.serving.jobs import Observer, Ticket
from ditf.runtime.serving.limits import Batching, Limits

T = TypeVar("T")

Picture = Union[bytes, np.ndarray]
"""An image in a request: an encoded file, or RGB uint8 [H, W, 3]."""


_SLICE_SCORES = 100_000_000  # points times pixels of one slice, which takes up to half a second


@dataclass(frozen=True)
class Correspondence:
    """Points of one picture and their matches in another.

    Attributes:
        points: float64 [N, 2], (x, y) in pixels of the source, as the request gave them.
        matches: their matches in the target.
        source_size, target_size: the sizes (H, W) of both images in pixels.
    """

    points: np.ndarray
    matches: Matches
    source_size: tuple[int, int]
    target_size: tuple[int, int]


@dataclass(frozen=True)
class _Prepared:
    """An image in a request: its features if they are in the cache, else its pixels for the engine."""

    key: bytes
    image_size: tuple[int, int]
    found: FeatureMap | FittedImage


class Service:
    """The bundles that are served. Its coroutines raise a DitfError for whatever is wrong with a request.

    Args:
        models: the models by bundle name, the default first. The service owns and closes them.
        limits: what a request may ask for.
        batching: how images are run together.
        cache_bytes: the most bytes of features that are kept.
        observer: receives measurements.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: Limits,
        batching: Batching,
        cache_bytes: int,
        observer: Observer,
    ) -> None:
        self.models = dict(models)
        self.limits = limits
        self.cache = FeatureCache(cache_bytes)
        self.worker = Worker(
            self.models, self.cache, limits.images, batching.delay_s, batching.images, observer
        )
        self._observer = observer
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "ditf-images")

    @property
    def default(self) -> str:
        """The name of the first bundle."""
        return next(iter(self.models))

    def bundle(self, name: str | None) -> str:
        """Check the name of a bundle; None stands for the first bundle.

        Raises:
            NotFound: the bundle is not served.
        """
        if name is None:
            return self.default
        if name not in self.models:
            raise NotFound(f"no bundle {name!r:.80} is served", f"there is {', '.join(self.models)}")
        return name

    async def features(
        self, bundle: str, pictures: Sequence[Picture], prompt: str | None, ticket: Ticket
    ) -> list[FeatureMap]:
        """Compute the features of images."""
        if len(pictures) > self.limits.images:
            raise TooLarge(f"{len(pictures)} images are more than {self.limits.images}", "send fewer at once")
        self.models[bundle].feeds(prompt)
        return await self._maps(
            bundle, await self._prepared(bundle, pictures, prompt, ticket), prompt, ticket
        )

    async def correspond(
        self,
        bundle: str,
        pictures: tuple[Picture, Picture],
        points: PointsLike,
        prompt: str | None,
        method: str,
        ticket: Ticket,
    ) -> Correspondence:
        """Find points of the first picture in the second; see `Model.match`."""
        check_method(method)
        source, target, checked = await self._pair(bundle, pictures, points, prompt, ticket)
        matches = await self._matched(bundle, source, target, checked, method, ticket)
        return Correspondence(checked, matches, source.image_size, target.image_size)

    async def match(
        self,
        bundle: str,
        source: FeatureMap,
        target: FeatureMap,
        points: PointsLike,
        method: str,
        ticket: Ticket,
    ) -> Matches:
        """Find points of one image in another, whose features are given; see `Model.match`."""
        check_method(method)
        self._check_count(points)
        for one in (source, target):
            check_size(one.image_size, self.limits)
        checked = check_points(points, source.image_size)
        self._check_work(len(checked), target.image_size)
        return await self._matched(bundle, source, target, checked, method, ticket)

    async def heat_map(
        self,
        bundle: str,
        pictures: tuple[Picture, Picture],
        point: Sequence[float],
        prompt: str | None,
        ticket: Ticket,
    ) -> np.ndarray:
        """The cosine of a point of the first picture with every pixel of the second, float32 [H, W]."""
        source, target, checked = await self._pair(bundle, pictures, [point], prompt, ticket)
        height, width = target.image_size
        ticket.hold(2 * 4 * height * width)  # float32, and its encoded form
        model = self.models[bundle]
        heat = (model.heat_map(source, target, point) for point in checked)
        [found] = await self._finished([self.worker.call("match", heat, ticket)], ticket)
        return found[0]

    async def aside(self, stage: str, work: Callable[[], T], ticket: Ticket) -> T:
        """Run work that needs no engine, such as decoding and drawing, in one of a few threads.

        Raises:
            DeadlineExceeded: the work was not done at the deadline. It is not begun after the deadline.
        """

        def timed() -> T:
            ticket.check()
            start = time.monotonic()
            result = work()
            self._observer.stage(stage, time.monotonic() - start)
            return result

        [result] = await self._finished([self._threads.submit(timed)], ticket)
        return result

    def warm_up(self) -> None:
        """Run every model once, so that it fails before the first request if it does, and is warm."""
        for name in self.models:
            self._warm_up(name)
        self.cache.clear()

    def _warm_up(self, bundle: str) -> None:
        model = self.models[bundle]
        fitted = model.fitted(np.zeros((*model.manifest.size, 3), np.uint8))
        ticket = Ticket("warm-up", float("inf"))
        [future] = self.worker.features(bundle, None, [(b"warm-up", fitted)], ticket)
        features = future.result()
        matching = (model.match(features, features, [[0, 0]]) for _ in range(1))
        self.worker.call("match", matching, ticket).result()

    def close(self, timeout_s: float) -> bool:
        """Stop the service; False if the engine did not end its call in time."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        return self.worker.close(timeout_s)

    async def _pair(
        self,
        bundle: str,
        pictures: tuple[Picture, Picture],
        points: PointsLike,
        prompt: str | None,
        ticket: Ticket,
    ) -> tuple[FeatureMap, FeatureMap, np.ndarray]:
        """Check the points, and compute the features of both pictures."""
        self._check_count(points)
        self.models[bundle].feeds(prompt)
        prepared = await self._prepared(bundle, pictures, prompt, ticket, ("source", "target"))
        checked = check_points(points, prepared[0].image_size)
        self._check_work(len(checked), prepared[1].image_size)
        source, target = await self._maps(bundle, prepared, prompt, ticket)
        return source, target, checked

    async def _prepared(
        self,
        bundle: str,
        pictures: Sequence[Picture],
        prompt: str | None,
        ticket: Ticket,
        names: Sequence[str] = (),
    ) -> list[_Prepared]:
        """Look pictures up in the cache, and decode and fit the others.

        Args:
            names: names of the pictures, for errors.
        """

        def prepare() -> list[_Prepared]:
            prepared = []
            for index, picture in enumerate(pictures):
                ticket.check()
                try:
                    prepared.append(self._prepare(bundle, picture, prompt))
                except InputError as error:
                    if names:
                        raise type(error)(f"{names[index]}: {error.problem}", error.fix) from error
                    raise
            return prepared

        return await self.aside("decode", prepare, ticket)

    def _prepare(self, bundle: str, picture: Picture, prompt: str | None) -> _Prepared:
        key = image_key(f"{bundle}\n{prompt or ''}", picture)
        kept = self.cache.get(key)
        self._observer.cache(kept is not None)
        if kept is not None:
            return _Prepared(key, kept.image_size, kept)
        if isinstance(picture, bytes):
            fitted = self.models[bundle].fitted(decode_upload(picture, self.limits))
        else:
            check_size((picture.shape[0], picture.shape[1]), self.limits)
            fitted = self.models[bundle].fitted(picture)
        return _Prepared(key, fitted.image_size, fitted)

    async def _maps(
        self, bundle: str, prepared: Sequence[_Prepared], prompt: str | None, ticket: Ticket
    ) -> list[FeatureMap]:
        missing = [(one.key, one.found) for one in prepared if isinstance(one.found, FittedImage)]
        futures = self.worker.features(bundle, prompt, missing, ticket) if missing else []
        computed = iter(await self._finished(futures, ticket))
        return [one.found if isinstance(one.found, FeatureMap) else next(computed) for one in prepared]

    async def _matched(
        self,
        bundle: str,
        source: FeatureMap,
        target: FeatureMap,
        points: np.ndarray,
        method: str,
        ticket: Ticket,
    ) -> Matches:
        model = self.models[bundle]
        height, width = target.image_size
        step = max(1, min(CHUNK, _SLICE_SCORES // (height * width)))

        def slices() -> Iterator[Matches]:
            matcher = model.matcher(source, target, method)
            yield matcher(points[:0])  # one slice for what depends on the target alone
            for start in range(0, len(points), step):
                yield matcher(points[start : start + step])

        [found] = await self._finished([self.worker.call("match", slices(), ticket)], ticket)
        return Matches(
            np.concatenate([one.points for one in found]), np.concatenate([one.scores for one in found])
        )

    async def _finished(self, futures: Sequence[Future[T]], ticket: Ticket) -> list[T]:
        """Wait for results from other threads. Work that is not done at the deadline is cancelled.

        Raises:
            DeadlineExceeded: a result was missing at the deadline.
        """
        if not futures:
            return []
        waiting = [asyncio.wrap_future(future) for future in futures]  # cancelled with this task
        try:
            _, late = await asyncio.wait(waiting, timeout=ticket.seconds_left)
            if late:
                raise DeadlineExceeded("the request waited past its deadline", "try again, or ask for less")
            return [one.result() for one in waiting]
        finally:
            for one in waiting:
                if not one.cancel() and not one.cancelled():
                    one.exception()  # otherwise asyncio logs that the exception was never retrieved

    def _check_count(self, points: PointsLike) -> None:
        if len(points) > self.limits.points:
            raise TooLarge(
                f"{len(points):,} points are more than {self.limits.points:,}", "send fewer at once"
            )

    def _check_work(self, points: int, target_size: tuple[int, int]) -> None:
        most = max(1, self.limits.scores // (target_size[0] * target_size[1]))
        if points > most:
            height, width = target_size
            raise TooLarge(
                f"{points:,} points in a target of {width}x{height} pixels are more than {most:,}, what"
                f" {self.limits.deadline_s:g} s are enough for",
                "send fewer at once, or a smaller target",
            )
