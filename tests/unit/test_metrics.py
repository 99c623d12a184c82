"""The metrics say exactly what the engine did."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.engine import (
    Engine,
    EngineConfig,
    FinishEvent,
    Gauges,
    SamplingParams,
    StepStats,
    Stream,
    Timings,
)
from serve.metrics import ENGINE, HTTP_REJECTIONS, EngineMetrics, Registry, render
from tests.fakes import FakeRunner

pytestmark = pytest.mark.unit

LABELS = {"model": "gettysburg", "backend": "cpu", "profile": "full"}
IDLE = Gauges(0, 0, 0, 0, 64)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def metrics(registry: Registry, gauges: Callable[[], Gauges] = lambda: IDLE) -> EngineMetrics:
    return EngineMetrics(registry, "gettysburg", "cpu", "full", gauges=gauges, window_seconds=10)


def scrape(registry: Registry) -> Samples:
    """What Prometheus reads, by name and all labels."""
    body, content_type = render(registry)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(body.decode()))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """Of the one engine."""
    return samples[name, frozenset({**LABELS, **labels}.items())]


def test_steps() -> None:
    registry = Registry()
    observer = metrics(registry)
    observer.on_step(StepStats("prefill", 0.5, 100, 2))
    observer.on_step(StepStats("prefill", 0.25, 50, 1))
    observer.on_step(StepStats("decode", 0.125, 3, 3))
    samples = scrape(registry)
    assert value(samples, "dlight_prefill_tokens_total") == 150
    assert value(samples, "dlight_prefill_seconds_total") == 0.75
    assert value(samples, "dlight_prefill_tokens_per_second") == 200
    assert value(samples, "dlight_decode_tokens_total") == 3
    assert value(samples, "dlight_decode_seconds_total") == 0.125
    assert value(samples, "dlight_decode_tokens_per_second") == 24
    assert value(samples, "dlight_step_seconds_count", phase="prefill") == 2
    assert value(samples, "dlight_step_tokens_sum", phase="prefill") == 150
    assert value(samples, "dlight_step_sequences_sum", phase="decode") == 3


def test_finished_requests() -> None:
    registry = Registry()
    observer = metrics(registry)
    observer.on_first_token(0.25)
    observer.on_inter_token(0.0625)
    observer.on_inter_token(0.125)
    observer.on_finish(FinishEvent("stop", 10, 4, 0, Timings(0.5, 0.25, 1.0)))
    observer.on_finish(FinishEvent("cancelled", 20, 0, 0, Timings(2.0)))
    observer.on_rejected("queue_full")
    samples = scrape(registry)
    counts = {"stop": 1, "length": 0, "cancelled": 1, "error": 0, "rejected": 1}
    for outcome, count in counts.items():
        assert value(samples, "dlight_requests_total", outcome=outcome) == count
    assert value(samples, "dlight_rejections_total", reason="queue_full") == 1
    assert value(samples, "dlight_rejections_total", reason="draining") == 0
    assert value(samples, "dlight_time_to_first_token_seconds_sum") == 0.25
    assert value(samples, "dlight_inter_token_seconds_sum") == 0.1875
    assert value(samples, "dlight_inter_token_seconds_count") == 2
    assert value(samples, "dlight_request_seconds_sum") == 3.75
    assert value(samples, "dlight_queue_seconds_sum") == 2.5
    assert value(samples, "dlight_prompt_tokens_sum") == 30
    assert value(samples, "dlight_generated_tokens_sum") == 4
    assert value(samples, "dlight_generated_tokens_count") == 2


def test_prefix_cache_and_preemptions() -> None:
    registry = Registry()
    observer = metrics(registry)
    observer.on_prefix_lookup(100, 64)
    observer.on_prefix_lookup(10, 0)
    observer.on_preemption()
    samples = scrape(registry)
    assert value(samples, "dlight_prefix_cache_queried_tokens_total") == 110
    assert value(samples, "dlight_prefix_cache_hit_tokens_total") == 64
    assert value(samples, "dlight_preemptions_total") == 1


def test_gauges_are_read_at_the_scrape() -> None:
    registry, state = Registry(), [Gauges(1, 2, 30, 4, 64)]
    metrics(registry, lambda: state[0])
    samples = scrape(registry)
    assert value(samples, "dlight_running_sequences") == 1
    assert value(samples, "dlight_waiting_sequences") == 2
    assert value(samples, "dlight_waiting_tokens") == 30
    assert value(samples, "dlight_kv_pages_used") == 4
    assert value(samples, "dlight_kv_pages_total") == 64
    state[0] = IDLE
    assert value(scrape(registry), "dlight_running_sequences") == 0


def test_libraries() -> None:
    registry = Registry()
    observer = metrics(registry)
    observer.on_library("cache", "none", "0123", "0.27")
    observer.on_library("compiled", "none", "0123", "0.27", compile_seconds=12.5)
    samples = scrape(registry)
    assert value(samples, "dlight_library_loads_total", source="cache") == 1
    assert value(samples, "dlight_library_loads_total", source="compiled") == 1
    assert value(samples, "dlight_compile_seconds_count") == 1
    assert value(samples, "dlight_compile_seconds_sum") == 12.5
    about = {"quantization": "none", "digest": "0123", "tvm": "0.27"}
    assert value(samples, "dlight_library_info", **about) == 1


def test_http() -> None:
    registry = Registry()
    registry.observe_http("/v1/completions", 200, 0.5)
    registry.observe_http("/v1/completions", 200, 0.25)
    registry.observe_http("/v1/completions", 400, 0.001)
    samples = scrape(registry)
    good = frozenset({"route": "/v1/completions", "status": "200"}.items())
    bad = frozenset({"route": "/v1/completions", "status": "400"}.items())
    assert samples["http_requests_total", good] == 2
    assert samples["http_requests_total", bad] == 1
    assert samples["http_request_seconds_sum", good] == 0.75


@pytest.mark.parametrize("reason", HTTP_REJECTIONS)
def test_what_did_not_get_to_an_engine_has_no_engines_labels(reason: str) -> None:
    registry = Registry()
    labels = frozenset({**dict.fromkeys(ENGINE, ""), "reason": reason}.items())
    assert scrape(registry)["dlight_rejections_total", labels] == 0
    registry.on_rejected(reason)
    assert scrape(registry)["dlight_rejections_total", labels] == 1


def test_reasons_are_a_closed_set() -> None:
    registry = Registry()
    with pytest.raises(KeyError):
        registry.on_rejected("queue_full")
    with pytest.raises(KeyError):
        metrics(registry).on_rejected("rate_limit")


def test_buckets_begin_at_100_microseconds() -> None:
    registry = Registry()
    metrics(registry).on_step(StepStats("decode", 0.00009, 1, 1))
    samples = scrape(registry)
    assert value(samples, "dlight_step_seconds_bucket", phase="decode", le="0.0001") == 1


def test_two_engines_share_the_names() -> None:
    registry = Registry()
    one = metrics(registry)
    EngineMetrics(registry, "gettysburg", "cpu", "gemv", lambda: Gauges(5, 0, 0, 0, 64))
    one.on_step(StepStats("decode", 0.1, 1, 1))
    body = render(registry)[0].decode()
    assert body.count("# TYPE dlight_decode_tokens_total counter\n") == 1
    assert body.count("# TYPE dlight_running_sequences gauge\n") == 1
    samples = scrape(registry)
    assert value(samples, "dlight_decode_tokens_total") == 1
    assert value(samples, "dlight_decode_tokens_total", profile="gemv") == 0
    assert value(samples, "dlight_running_sequences", profile="gemv") == 5


def test_every_engine_metric_says_which_engine() -> None:
    registry = Registry()
    metrics(registry).on_library("cache", "none", "0123", "0.27")
    for name, labels in scrape(registry):
        if name.startswith("dlight_server_"):  # of the process
            continue
        assert name.startswith("dlight_")
        assert not name.endswith("_created")
        assert ":" not in name
        assert labels >= LABELS.items() or dict(labels).get("reason") in HTTP_REJECTIONS


class Recorder(EngineMetrics):
    """Metrics that a test can wait for."""

    finished: queue.SimpleQueue[FinishEvent]

    def on_finish(self, event: FinishEvent) -> None:
        super().on_finish(event)
        self.finished.put(event)


def test_a_load_of_known_size_is_counted_exactly() -> None:
    registry, runner = Registry(), FakeRunner()
    recorder = Recorder(registry, "gettysburg", "cpu", "full", gauges=lambda: engine.gauges())
    recorder.finished = queue.SimpleQueue()
    engine = Engine(runner, EngineConfig(max_running=4, prefix_sharing=False), recorder)
    engine.start()
    prompts = [[n] * (n + 1) for n in range(20)]
    asyncio.run(_run(engine, prompts, max_tokens=7))
    for _ in prompts:
        recorder.finished.get(timeout=60)
    samples = scrape(registry)
    num_prompt_tokens = sum(map(len, prompts))
    assert value(samples, "dlight_prefill_tokens_total") == num_prompt_tokens
    assert value(samples, "dlight_prompt_tokens_sum") == num_prompt_tokens
    assert value(samples, "dlight_decode_tokens_total") == 20 * 6  # the first is prefill's
    assert value(samples, "dlight_generated_tokens_sum") == 20 * 7
    assert value(samples, "dlight_requests_total", outcome="length") == 20
    assert value(samples, "dlight_time_to_first_token_seconds_count") == 20
    assert value(samples, "dlight_queue_seconds_count") == 20
    num_steps = {
        what: sum(call[0] == what for call in runner.calls) for what in ("prefill", "decode")
    }
    for phase, count in num_steps.items():
        assert value(samples, "dlight_step_seconds_count", phase=phase) == count
    for name in ("running_sequences", "waiting_sequences", "waiting_tokens", "kv_pages_used"):
        assert value(samples, f"dlight_{name}") == 0


async def _run(engine: Engine, prompts: list[list[int]], max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    streams = [engine.submit(prompt, params) for prompt in prompts]
    await asyncio.gather(*(_read(stream) for stream in streams))
    await engine.drain(60)


async def _read(stream: Stream) -> None:
    async for _ in stream:
        pass
