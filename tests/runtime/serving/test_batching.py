"""The worker, with a real engine that fails or takes long if an image says so."""

from __future__ import annotations

import time
from concurrent.futures import wait

import numpy as np
import pytest

from ditf.runtime.errors import InputError
from ditf.runtime.feature_cache import FeatureCache
from ditf.runtime.model import load
from ditf.runtime.serving.batching import Worker
from ditf.runtime.serving.errors import DeadlineExceeded, EngineError, Overloaded
from ditf.runtime.serving.jobs import Ticket
from tests.runtime.serving.tiny import image, mean_colours

SOON = Ticket("test", float("inf"))


class Seen:
    """Records what the worker reports."""

    def __init__(self):
        self.batches, self.stages, self.failures = [], [], 0

    def stage(self, name, seconds):
        self.stages.append(name)

    def batch(self, images):
        self.batches.append(images)

    def cache(self, hit):
        pass

    def engine_failed(self):
        self.failures += 1


class Bench:
    """A worker on a bundle, with a short way to use it."""

    def __init__(self, bundle, images=32, delay_s=0.05, largest=4, cache=0):
        self.seen = Seen()
        self.model = load(bundle)
        self.worker = Worker({"one": self.model}, FeatureCache(cache), images, delay_s, largest, self.seen)

    def busy(self, loops):
        """Queue an image that takes the engine some time, and wait until it has begun."""
        [future] = self.ask(image(1, loops=loops))
        while self.worker.waiting:
            time.sleep(0.001)
        return future

    def ask(self, *pictures, ticket=SOON):
        entries = [(picture.tobytes(), self.model.fitted(picture)) for picture in pictures]
        return self.worker.features("one", None, entries, ticket)


@pytest.fixture
def bench(tiny):
    made = []

    def make(**options):
        made.append(Bench(options.pop("bundle", tiny), **options))
        return made[-1]

    yield make
    assert all(one.worker.close(10) for one in made)


def check(futures, pictures):
    for future, picture in zip(futures, pictures, strict=True):
        np.testing.assert_allclose(future.result(10).array, mean_colours(picture), rtol=1e-5)


def test_images_go_together_as_soon_as_a_batch_is_full(bench):
    one = bench(delay_s=30)  # the delay would outlast the test
    pictures = [image(seed) for seed in range(8)]
    check(one.ask(*pictures), pictures)
    assert one.seen.batches == [4, 4]


def test_one_image_waits_for_the_delay_and_no_longer(bench):
    one = bench(delay_s=0.2)
    start = time.monotonic()
    one.ask(image(1))[0].result(10)
    assert time.monotonic() - start >= 0.2
    assert one.seen.batches == [1]


def test_a_static_batch_is_the_bundles(bench, demo_bundle_float32):
    one = bench(bundle=demo_bundle_float32, delay_s=30)
    assert all(future.result(20) for future in one.ask(*(image(seed) for seed in range(3))))
    assert one.seen.batches == [3]


def test_a_failure_in_a_batch_fails_alone(bench):
    one = bench(delay_s=30)
    pictures = [image(seed, fails=seed == 2) for seed in range(4)]
    futures = one.ask(*pictures)
    with pytest.raises(EngineError, match="failed on this request"):
        futures[2].result(10)
    del futures[2], pictures[2]
    check(futures, pictures)
    assert one.seen.failures == 1
    assert one.worker.alive


def test_one_image_asked_for_by_many_is_computed_once(bench):
    one = bench(delay_s=30, cache=1 << 20)
    picture = image(7)
    check(one.ask(*[picture] * 4), [picture] * 4)
    assert one.seen.batches == [1]
    check(one.ask(*[picture] * 4), [picture] * 4)  # kept since
    assert one.seen.batches == [1]


def test_what_was_given_up_or_is_late_is_not_run(bench):
    one = bench(delay_s=0)
    slow = one.busy(20)
    [late] = one.ask(image(2), ticket=Ticket("late", time.monotonic() + 0.01))
    [left] = one.ask(image(3))
    assert left.cancel()
    with pytest.raises(DeadlineExceeded):
        late.result(10)
    slow.result(10)
    assert one.seen.batches == [1]


def test_the_queue_is_bounded_and_takes_all_or_none(bench):
    one = bench(images=4, delay_s=0)
    slow = one.busy(30)
    queued = one.ask(image(2), image(3), image(4))
    with pytest.raises(Overloaded):
        one.ask(image(5), image(6))
    assert one.worker.waiting == 3
    queued.pop(0).cancel()
    queued += one.ask(image(5), image(6))  # what was given up makes room
    assert wait([slow, *queued], 10).not_done == set()


def test_calls_go_first_and_their_failures_are_their_own(bench):
    one = bench(delay_s=0)
    order = []
    slow = one.busy(20)
    [after] = one.ask(image(2))
    after.add_done_callback(lambda _: order.append("image"))
    call = one.worker.call("match", (order.append("call") for _ in range(1)), SOON)
    wait([after, call, slow], 10)
    assert order == ["call", "image"]

    def wrong():
        yield 1
        raise InputError("no such point")

    def broken():
        yield 1 / 0

    with pytest.raises(InputError, match="no such point"):
        one.worker.call("match", wrong(), SOON).result(10)
    with pytest.raises(EngineError):
        one.worker.call("match", broken(), SOON).result(10)


def test_slices_let_others_through(bench):
    one = bench(delay_s=0)
    order = []

    def slices(name, count):
        for step in range(count):
            order.append(name)
            yield step

    slow = one.busy(100)
    long = one.worker.call("match", slices("long", 6), SOON)
    short = one.worker.call("match", slices("short", 1), SOON)
    futures = one.ask(image(2)) + one.ask(image(3))
    for future in futures:
        future.add_done_callback(lambda _: order.append("image"))
    assert wait([slow, long, short, *futures], 20).not_done == set()
    assert long.result() == list(range(6))
    assert order[-2:] == ["long", "long"]
    assert order.count("long") == 6
    assert order.index("short") < 4


def test_slices_end_at_the_deadline_or_when_they_are_given_up(bench):
    one = bench(delay_s=0)
    late, left = [], []

    def slices(seen, what):
        while True:
            seen.append(1)
            what()
            yield 1

    soon = Ticket("late", time.monotonic() + 0.05)
    with pytest.raises(DeadlineExceeded):
        one.worker.call("match", slices(late, lambda: time.sleep(0.001)), soon).result(20)
    future = one.worker.call("match", slices(left, lambda: future.cancel()), SOON)
    one.worker.call("match", iter([1]), SOON).result(20)
    while one.worker.waiting or one.worker.running:
        time.sleep(0.001)
    assert future.cancelled()
    assert len(left) == 1


def test_closing_fails_what_waits_and_takes_nothing(tiny):
    one = Bench(tiny, delay_s=30)
    [waiting] = one.ask(image(1))
    assert one.worker.close(10)
    assert waiting.cancelled()
    with pytest.raises(Overloaded):
        one.ask(image(2))
    with pytest.raises(Overloaded):
        one.worker.call("match", iter([1]), SOON)


def test_an_engine_that_does_not_end_bounds_closing(tiny):
    one = Bench(tiny, delay_s=0)
    slow = one.busy(60)
    assert not one.worker.close(0.01)
    slow.result(20)
    assert one.worker.close(20)
