"""The memory of matching does not grow with the number of queries; tracemalloc sees what numpy allocates."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from ditf.runtime.matching.mutual import mutual_matches
from ditf.runtime.matching.points import match_points
from tests.runtime.maps import random_map


def peak(work: Callable[[], object]) -> int:
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", ["argmax", "window", "kernel"])
def test_of_points(method):
    source, target = random_map(0, (64, 12, 12), (96, 96)), random_map(1, (64, 12, 12), (96, 96))
    points = np.random.default_rng(2).uniform(0, 95, (2000, 2))
    few, many = (peak(lambda n=n: match_points(source, target, points[:n], method)) for n in (64, 2000))
    # beside the points' own arrays: their weights over rows and columns, and the answers
    assert many - few < 2000 * 1000
    assert many < 12e6  # 2,000 rows of scores alone would be 74 MB


def test_of_mutual_matches():
    source, target = random_map(0, (32, 60, 60), (96, 96)), random_map(1, (32, 60, 60), (96, 96))
    assert peak(lambda: mutual_matches(source, target)) < 20e6  # all cosines at once would be 52 MB
