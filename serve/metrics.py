"""Prometheus metrics of the engines and the HTTP layer, by the names in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.engine import FinishEvent, Gauges, StepStats, ThroughputWindow

# Its "_created" series would double the number of ours.
disable_created_metrics()  # type: ignore[no-untyped-call]

Outcome = Literal["stop", "length", "cancelled", "timeout", "error", "rejected"]
Source = Literal["cache", "compiled"]
Buckets = tuple[float, ...]

ENGINE = ("model", "backend", "profile")
OUTCOMES: tuple[Outcome, ...] = (
    "stop",
    "length",
    "cancelled",
    "timeout",
    "error",
    "rejected",
)
ENGINE_REJECTIONS = ("queue_full", "queue_tokens", "draining", "engine_dead")
HTTP_REJECTIONS = ("rate_limit", "invalid_key", "not_local", "body_too_large")
NO_ENGINE = ("", "", "")  # an empty label is to Prometheus as one that is not there

# From 100 µs, since this model decodes in milliseconds.
SECONDS = tuple(n * unit for unit in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0) for n in (1, 2.5, 5))
COMPILE_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SEQUENCES = tuple(2.0**n for n in range(9))  # 1 to 256
TOKENS = tuple(2.0**n for n in range(13))  # 1 to 4096


class Registry(CollectorRegistry):
    """Every metric of the process, declared once; engines and the HTTP layer fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.engines: list[EngineMetrics] = []
        self._declare_work()
        self._declare_steps()
        self._declare_requests()
        self._declare_libraries()
        self.register(_State(self.engines))
        self.tasks = Gauge("dlight_server_tasks", "asyncio tasks of the server", registry=self)
        http = ("route", "status")
        self._http_rejections = {r: self.rejections.labels(*NO_ENGINE, r) for r in HTTP_REJECTIONS}
        self._http_requests = self._counter("http_requests_total", "HTTP requests", http)
        self._http_seconds = self._histogram(
            "http_request_seconds", "From a request's head to the end of its answer", SECONDS, http
        )

    def observe_http(self, route: str, status: int, seconds: float) -> None:
        """Count one HTTP request; `route` is the template, never the path."""
        self._http_requests.labels(route, str(status)).inc()
        self._http_seconds.labels(route, str(status)).observe(seconds)

    def on_rejected(self, reason: str) -> None:
        """A request that the HTTP layer kept from its endpoint, for one of HTTP_REJECTIONS."""
        self._http_rejections[reason].inc()

    def _declare_work(self) -> None:
        count = self._counter
        self.prefill_tokens = count("dlight_prefill_tokens_total", "Tokens put through prefill")
        self.decode_tokens = count(
            "dlight_decode_tokens_total", "Tokens put through decode: one a sequence and step"
        )
        self.prefill_seconds = count("dlight_prefill_seconds_total", "Runner's time in prefill")
        self.decode_seconds = count("dlight_decode_seconds_total", "Runner's time in decode")
        self.prefix_queried = count(
            "dlight_prefix_cache_queried_tokens_total", "Prompt tokens looked up in the cache"
        )
        self.prefix_hits = count(
            "dlight_prefix_cache_hit_tokens_total", "Prompt tokens found in the cache"
        )
        self.preemptions = count(
            "dlight_preemptions_total", "Sequences sent back to the queue for want of KV pages"
        )
        self.drafted = count(
            "dlight_speculation_drafted_tokens_total", "Tokens guessed by prompt lookup"
        )
        self.accepted = count(
            "dlight_speculation_accepted_tokens_total", "Guessed tokens that proved right"
        )

    def _declare_steps(self) -> None:
        labels = (*ENGINE, "phase")
        histogram = self._histogram
        self.step_seconds = histogram("dlight_step_seconds", "A model call", SECONDS, labels)
        self.step_sequences = histogram(
            "dlight_step_sequences", "Sequences of a model call", SEQUENCES, labels
        )
        self.step_tokens = histogram("dlight_step_tokens", "Tokens of a model call", TOKENS, labels)

    def _declare_requests(self) -> None:
        histogram = self._histogram
        self.first_token_seconds = histogram(
            "dlight_time_to_first_token_seconds", "From arrival to the first token", SECONDS
        )
        self.inter_token_seconds = histogram(
            "dlight_inter_token_seconds", "Between two tokens of a sequence", SECONDS
        )
        self.request_seconds = histogram(
            "dlight_request_seconds", "From arrival to the last token", SECONDS
        )
        self.queue_seconds = histogram("dlight_queue_seconds", "Waiting to be admitted", SECONDS)
        self.prompt_tokens = histogram("dlight_prompt_tokens", "Prompt of one sequence", TOKENS)
        self.generated_tokens = histogram(
            "dlight_generated_tokens", "Tokens generated for one sequence", TOKENS
        )
        self.requests = self._counter(
            "dlight_requests_total", "Sequences by how they ended", (*ENGINE, "outcome")
        )
        self.rejections = self._counter(
            "dlight_rejections_total", "Requests that were not begun", (*ENGINE, "reason")
        )

    def _declare_libraries(self) -> None:
        self.compile_seconds = self._histogram(
            "dlight_compile_seconds", "One compilation of a library", COMPILE_SECONDS
        )
        self.library_loads = self._counter(
            "dlight_library_loads_total", "Libraries loaded, by origin", (*ENGINE, "source")
        )
        self.library_info = Gauge(
            "dlight_library_info",
            "The library that serves, as labels",
            (*ENGINE, "quantization", "digest", "tvm"),
            registry=self,
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ENGINE) -> Counter:
        return Counter(name, text, labels, registry=self)

    def _histogram(
        self, name: str, text: str, buckets: Buckets, labels: tuple[str, ...] = ENGINE
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self)


class EngineMetrics:
    """One engine's EngineObserver. `gauges` is asked at each scrape, in the scraper's thread."""

    def __init__(
        self,
        registry: Registry,
        model: str,
        backend: str,
        profile: str,
        gauges: Callable[[], Gauges],
        window_seconds: float = 10.0,
    ) -> None:
        self.registry, self.gauges = registry, gauges
        self.labels = labels = (model, backend, profile)
        self.prefill_window = ThroughputWindow(window_seconds)
        self.decode_window = ThroughputWindow(window_seconds)
        self._phases = {
            "prefill": _Phase(registry, labels, "prefill", self.prefill_window),
            "decode": _Phase(registry, labels, "decode", self.decode_window),
        }
        self._outcomes = {o: registry.requests.labels(*labels, o) for o in OUTCOMES}
        self._rejections = {r: registry.rejections.labels(*labels, r) for r in ENGINE_REJECTIONS}
        self._first_token_seconds = registry.first_token_seconds.labels(*labels)
        self._inter_token_seconds = registry.inter_token_seconds.labels(*labels)
        self._request_seconds = registry.request_seconds.labels(*labels)
        self._queue_seconds = registry.queue_seconds.labels(*labels)
        self._prompt_tokens = registry.prompt_tokens.labels(*labels)
        self._generated_tokens = registry.generated_tokens.labels(*labels)
        self._prefix_queried = registry.prefix_queried.labels(*labels)
        self._prefix_hits = registry.prefix_hits.labels(*labels)
        self._preemptions = registry.preemptions.labels(*labels)
        self._drafted = registry.drafted.labels(*labels)
        self._accepted = registry.accepted.labels(*labels)
        self._info: tuple[str, ...] | None = None
        registry.engines.append(self)

    def close(self) -> None:
        """Its engine is gone: what it counted stays, its gauges do not."""
        self.registry.engines.remove(self)
        if self._info is not None:
            self.registry.library_info.remove(*self._info)

    def on_step(self, stats: StepStats) -> None:
        self._phases[stats.phase].add(stats)

    def on_first_token(self, seconds: float) -> None:
        self._first_token_seconds.observe(seconds)

    def on_inter_token(self, seconds: float) -> None:
        self._inter_token_seconds.observe(seconds)

    def on_prefix_lookup(self, num_queried: int, num_hit: int) -> None:
        self._prefix_queried.inc(num_queried)
        self._prefix_hits.inc(num_hit)

    def on_preemption(self) -> None:
        self._preemptions.inc()

    def on_speculation(self, num_drafted: int, num_accepted: int) -> None:
        self._drafted.inc(num_drafted)
        self._accepted.inc(num_accepted)

    def on_finish(self, event: FinishEvent) -> None:
        times = event.timings
        self._outcomes[event.reason].inc()
        self._queue_seconds.observe(times.queue_seconds)
        self._request_seconds.observe(
            times.queue_seconds + times.prefill_seconds + times.decode_seconds
        )
        self._prompt_tokens.observe(event.num_prompt_tokens)
        self._generated_tokens.observe(event.num_generated_tokens)

    def on_rejected(self, reason: str) -> None:
        """A request that the engine refused to queue, for one of ENGINE_REJECTIONS.

        Called in the HTTP layer's thread.
        """
        self._outcomes["rejected"].inc()
        self._rejections[reason].inc()

    def on_library(
        self, source: Source, quantization: str, digest: str, tvm: str, compile_seconds: float = 0.0
    ) -> None:
        """The engine's library is loaded; `compile_seconds` counts where `source` is "compiled"."""
        registry = self.registry
        registry.library_loads.labels(*self.labels, source).inc()
        if source == "compiled":
            registry.compile_seconds.labels(*self.labels).observe(compile_seconds)
        self._info = (*self.labels, quantization, digest, tvm)
        registry.library_info.labels(*self._info).set(1)


class _Phase:
    """The series of one engine's prefill or decode steps."""

    def __init__(
        self,
        registry: Registry,
        labels: tuple[str, ...],
        phase: Literal["prefill", "decode"],
        window: ThroughputWindow,
    ) -> None:
        is_prefill = phase == "prefill"
        tokens = registry.prefill_tokens if is_prefill else registry.decode_tokens
        seconds = registry.prefill_seconds if is_prefill else registry.decode_seconds
        self._tokens, self._seconds = tokens.labels(*labels), seconds.labels(*labels)
        self._step_seconds = registry.step_seconds.labels(*labels, phase)
        self._step_sequences = registry.step_sequences.labels(*labels, phase)
        self._step_tokens = registry.step_tokens.labels(*labels, phase)
        self._window = window

    def add(self, stats: StepStats) -> None:
        self._tokens.inc(stats.num_tokens)
        self._seconds.inc(stats.seconds)
        self._window.add(stats.num_tokens, stats.seconds)
        self._step_seconds.observe(stats.seconds)
        self._step_sequences.observe(stats.num_sequences)
        self._step_tokens.observe(stats.num_tokens)


class _State(Collector):
    """The gauges: read from the engines at the moment of the scrape, each engine once."""

    _GAUGES: tuple[tuple[str, str, Callable[[Gauges], float]], ...] = (
        ("dlight_running_sequences", "Sequences being computed", lambda g: g.num_running),
        ("dlight_waiting_sequences", "Sequences in the queue", lambda g: g.num_waiting),
        ("dlight_waiting_tokens", "Tokens of the queue", lambda g: g.num_waiting_tokens),
        ("dlight_kv_pages_used", "KV pages of running sequences", lambda g: g.num_pages_used),
        ("dlight_kv_pages_total", "KV pages in all", lambda g: g.num_pages_total),
    )

    def __init__(self, engines: list[EngineMetrics]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        states = [(engine.labels, engine.gauges()) for engine in list(self._engines)]
        for name, text, value in self._GAUGES:
            family = GaugeMetricFamily(name, text, labels=ENGINE)
            for labels, gauges in states:
                family.add_metric(labels, value(gauges))
            yield family
        yield self._throughput("prefill", lambda e: e.prefill_window)
        yield self._throughput("decode", lambda e: e.decode_window)

    def _throughput(
        self, phase: str, window: Callable[[EngineMetrics], ThroughputWindow]
    ) -> Metric:
        text = f"Tokens per second of {phase}, over the last seconds in which there was any"
        family = GaugeMetricFamily(f"dlight_{phase}_tokens_per_second", text, labels=ENGINE)
        for engine in self._engines:
            family.add_metric(engine.labels, window(engine).tokens_per_second())
        return family


def render(registry: CollectorRegistry) -> tuple[bytes, str]:
    """The body of /metrics, in Prometheus' text format, and its content type."""
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
