"""The same call runs thousands of times from several threads, as on a robot."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import ditf
from ditf.calib.images import procedural_images
from ditf.calib.machine import resident_bytes

MATCHES = 2000
WARM_UP = 300
ROOM = 8e6  # bytes that an allocator's free lists may still take after the warm-up


def test_memory_does_not_grow(pixart_bundle):
    images = procedural_images((48, 80), 5)
    points = [(10.0, 12.0), (40.5, 30.25), (60.0, 20.0)]
    with ditf.load(pixart_bundle) as model:
        tracker = model.track(images[0], points)
        for index in range(MATCHES):
            tracker.update(images[index % 5])
            if index == WARM_UP:
                gc.collect()
                before = resident_bytes()
        gc.collect()
        assert resident_bytes() - before < ROOM


def test_the_same_from_four_threads(pixart_bundle):
    images = procedural_images((48, 80), 8)
    points = np.array([(10.0, 12.0), (40.5, 30.25)])
    with ditf.load(pixart_bundle) as model:
        source = model.features(images[0])

        def work(image):
            target = model.features(image)
            by_graph = model.match_with_graph(source, target, points)
            return target.array, model.match(source, target, points).points, by_graph.points

        alone = [work(image) for image in images]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(work, images * 4))
    for index, found in enumerate(together):
        for one, other in zip(found, alone[index % len(images)], strict=True):
            np.testing.assert_array_equal(one, other)
