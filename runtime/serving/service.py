"""What a server does with a request, whatever route it came by: images to features to matches."""

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
"""An image of a request: an encoded file, or RGB uint8 [H, W, 3]."""


_SLICE_SCORES = 100_000_000  # points times pixels between which others get the engine: up to half a second


@dataclass(frozen=True)
class Correspondence:
    """Points of one picture and their matches in another.

    Attributes:
        points: float64 [N, 2], as asked for.
        matches: in the target.
        source_size, target_size: (H, W) px.
    """

    points: np.ndarray
    matches: Matches
    source_size: tuple[int, int]
    target_size: tuple[int, int]


@dataclass(frozen=True)
class _Prepared:
    """An image of a request: its features if they are known, else what the engine takes."""

    key: bytes
    image_size: tuple[int, int]
    found: FeatureMap | FittedImage


class Service:
    """The bundles that are served. Its coroutines raise a DitfError for whatever is wrong with a request.

    Args:
        models: by bundle name, the default first. The service's from now on.
        limits: what a request may ask for.
        batching: how images are put together.
        cache_bytes: of features that are kept.
        observer: told of what happens.
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
        """Name of the first bundle."""
        return next(iter(self.models))

    def bundle(self, name: str | None) -> str:
        """The name of a bundle; the first one's for None.

        Raises:
            NotFound: it is not served.
        """
        if name is None:
            return self.default
        if name not in self.models:
            raise NotFound(f"no bundle {name!r:.80} is served", f"there is {', '.join(self.models)}")
        return name

    async def features(
        self, bundle: str, pictures: Sequence[Picture], prompt: str | None, ticket: Ticket
    ) -> list[FeatureMap]:
        """Features of images."""
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
        """Where points of the first picture are in the second; see `Model.match`."""
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
        """Where points of one image are in another, of which features are given; see `Model.match`."""
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
        """Cosine of a point of the first picture with every pixel of the second, float32 [H, W]."""
        source, target, checked = await self._pair(bundle, pictures, [point], prompt, ticket)
        height, width = target.image_size
        ticket.hold(2 * 4 * height * width)  # float32, and what it is encoded to
        model = self.models[bundle]
        heat = (model.heat_map(source, target, point) for point in checked)
        [found] = await self._finished([self.worker.call("match", heat, ticket)], ticket)
        return found[0]

    async def aside(self, stage: str, work: Callable[[], T], ticket: Ticket) -> T:
        """Run what needs no engine, decoding and drawing, in one of a few threads.

        Raises:
            DeadlineExceeded: it was not done at the deadline; it is not begun after it.
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
        """Run every model once: what does not run is known before anybody asks, and first calls are slow."""
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
        """Stop; False if the engine did not end its call in time."""
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
        """Features of both pictures, and the points, which are checked before the engine is asked."""
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
        """Pictures decoded and fitted, those that are not known.

        Args:
            names: of the pictures, for errors.
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
            yield matcher(points[:0])  # what depends on the target alone took its time
            for start in range(0, len(points), step):
                yield matcher(points[start : start + step])

        [found] = await self._finished([self.worker.call("match", slices(), ticket)], ticket)
        return Matches(
            np.concatenate([one.points for one in found]), np.concatenate([one.scores for one in found])
        )

    async def _finished(self, futures: Sequence[Future[T]], ticket: Ticket) -> list[T]:
        """Results that other threads give. What is not there at the deadline is given up.

        Raises:
            DeadlineExceeded: that was so.
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
                    one.exception()  # asyncio complains of failures that nobody looked at

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
