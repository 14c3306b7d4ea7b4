"""Metrics of the server, for Prometheus: of one process, or of all workers together."""

from __future__ import annotations

import os
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable that names the folder of the metrics of all workers. prometheus_client reads it when it
is imported; without it, the metrics are those of this process."""

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one server, in their own registry."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "qrank_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "qrank_request_seconds",
            "From a request's first byte to its answer's last.",
            ["path"],
            registry=registry,
            buckets=_SECONDS,
        )
        workers = Gauge(
            "qrank_workers",
            "Processes that serve.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        workers.set(1)
        self._target = Gauge(
            "qrank_target_info",
            "1 for what runs, 0 for what ran.",
            ["model", "target"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._pairs = Counter("qrank_pairs", "Pairs scored.", ["model"], registry=registry)
        self._tokens = Counter("qrank_tokens", "Tokens read.", ["model"], registry=registry)
        self._queue_tokens = Gauge(
            "qrank_queue_tokens",
            "Tokens waiting or running.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._queue_requests = Gauge(
            "qrank_queue_requests",
            "Requests waiting or running.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._dropped = Counter(
            "qrank_dropped",
            "Requests not scored: overflow, timeout, disconnect.",
            ["model", "reason"],
            registry=registry,
        )
        self._batch_pairs = Histogram(
            "qrank_batch_pairs",
            "Pairs scored in one call of the engine.",
            ["model"],
            registry=registry,
            buckets=_SIZES,
        )
        self._batch_seconds = Histogram(
            "qrank_batch_seconds",
            "One call of the engine.",
            ["model"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._wait = Histogram(
            "qrank_queue_seconds",
            "From a request's coming to its first pair's turn.",
            ["model"],
            registry=registry,
            buckets=_SECONDS,
        )

        self._open = Gauge(
            "qrank_model_open",
            "Processes in which the model is open.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._openings = Counter(
            "qrank_model_openings", "Openings of the model.", ["model"], registry=registry
        )
        self._closings = Counter(
            "qrank_model_closings",
            "Closings of the model: idle, memory.",
            ["model", "reason"],
            registry=registry,
        )
        self._cached = Counter(
            "qrank_score_cache",
            "Pairs looked up in the cache of scores: hit, miss.",
            ["model", "result"],
            registry=registry,
        )

    def opened(self, model: str) -> None:
        """Count that a model was opened."""
        self._open.labels(model).set(1)
        self._openings.labels(model).inc()

    def closed(self, model: str, target: str, reason: str) -> None:
        """Count that a model was closed that ran as `target`."""
        self._target.labels(model, target).set(0)
        self._open.labels(model).set(0)
        self._closings.labels(model, reason).inc()

    def of(self, model: str, target: str) -> ModelMetrics:
        """The metrics of one model that runs as `target`."""
        self._target.labels(model, target).set(1)
        return ModelMetrics(
            self._pairs.labels(model),
            self._tokens.labels(model),
            self._queue_tokens.labels(model),
            self._queue_requests.labels(model),
            {
                reason: self._dropped.labels(model, reason)
                for reason in ("overflow", "timeout", "disconnect")
            },
            self._batch_pairs.labels(model),
            self._batch_seconds.labels(model),
            self._wait.labels(model),
            self._cached.labels(model, "hit"),
            self._cached.labels(model, "miss"),
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        registry = self._registry
        if os.environ.get(FOLDER):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)


@dataclass(frozen=True)
class ModelMetrics:
    """The metrics of one model; `dropped` by reason."""

    pairs: Counter
    tokens: Counter
    queue_tokens: Gauge
    queue_requests: Gauge
    dropped: dict[str, Counter]
    batch_pairs: Histogram
    batch_seconds: Histogram
    wait: Histogram
    cache_hits: Counter
    cache_misses: Counter

    def batch(self, pairs: int, tokens: int, seconds: float) -> None:
        """Count one call of the engine."""
        self.pairs.inc(pairs)
        self.tokens.inc(tokens)
        self.batch_pairs.observe(pairs)
        self.batch_seconds.observe(seconds)
