"""What a service counts, in Prometheus' text format. Its registry is its own, so that several services can live in one
process."""

from __future__ import annotations

import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "perpetune_requests", "Requests to /predict by the code of the answer.", ["code"], registry=registry
        )
        self.gone = Counter("perpetune_gone", "Requests whose client went away before the answer.", registry=registry)
        self.seconds = Histogram(
            "perpetune_request_seconds",
            "Seconds from a request's head to its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self.pictures = Counter("perpetune_pictures", "Pictures that were answered.", registry=registry)
        self.batch = Histogram(
            "perpetune_batch_pictures", "Pictures in one pass of the model.", buckets=PICTURES, registry=registry
        )
        self.computing = Histogram(
            "perpetune_batch_seconds", "Seconds of one pass of the model.", buckets=SECONDS, registry=registry
        )
        self.held = Gauge("perpetune_requests_held", "Requests to /predict without an answer yet.", registry=registry)
        self.state = Gauge("perpetune_state", "How many tasks the answering model has learned.", registry=registry)
        self.taken = Counter("perpetune_state_taken", "Commits and rollbacks that were taken up.", registry=registry)
        self.behind = Gauge(
            "perpetune_state_behind", "1 if the newest commit cannot be read, else 0.", registry=registry
        )
        with contextlib.suppress(OSError):
            ProcessCollector(registry=registry)

    def passed(self, pictures: int, seconds: float) -> None:
        """Count one pass of the model."""
        self.pictures.inc(pictures)
        self.batch.observe(pictures)
        self.computing.observe(seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
