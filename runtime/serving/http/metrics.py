"""The server's metrics for Prometheus."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """Metrics in a registry of their own. It is the `Observer` of the worker and the service."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._stage = Histogram(
            "ditf_stage_seconds",
            "Time of a stage: read (the body), inflate, parse, decode, queue, features (one call), match,"
            " draw, encode",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._request = Histogram(
            "ditf_request_seconds", "Head to answer", ["endpoint"], buckets=_SECONDS, registry=registry
        )
        self._requests = Counter(
            "ditf_requests", "Answered requests", ["endpoint", "status"], registry=registry
        )
        self._batch = Histogram(
            "ditf_batch_images", "Images in a call of the engine", buckets=_IMAGES, registry=registry
        )
        self._cache = Counter("ditf_cache", "Images looked for in the cache", ["found"], registry=registry)
        self._failures = Counter("ditf_engine_failures", "Engine calls that raised", registry=registry)
        self._gauges = {
            name: Gauge(name, text, registry=registry)
            for name, text in (
                ("ditf_queue_depth", "Images and matchings that wait for the engine"),
                ("ditf_engine_busy", "1 while the engine runs"),
                ("ditf_requests_in_flight", "Requests let in and not answered"),
                ("ditf_buffered_bytes", "That requests hold"),
                ("ditf_cache_bytes", "Of features in the cache"),
                ("ditf_cache_images", "Images in the cache"),
            )
        }

    def stage(self, name: str, seconds: float) -> None:
        self._stage.labels(name).observe(seconds)

    def batch(self, images: int) -> None:
        self._batch.observe(images)

    def cache(self, hit: bool) -> None:
        self._cache.labels("yes" if hit else "no").inc()

    def engine_failed(self) -> None:
        self._failures.inc()

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request.labels(endpoint).observe(seconds)

    def text(self, **gauges: float) -> bytes:
        """The metrics in Prometheus' text format.

        Args:
            gauges: the current values of the gauges, by name without the prefix.
        """
        for name, value in gauges.items():
            self._gauges[f"ditf_{name}"].set(value)
        return generate_latest(self._registry)
