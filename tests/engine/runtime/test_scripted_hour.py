"""What /metrics says after an hour in which it is known what happened when: every sample, and no name beside them."""

import asyncio
import logging
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.openai.app import create_app
from engine.openai.http import http_metrics
from engine.openai.http.options import ServerOptions
from tests.engine.openai.fakes import FakeLLM, served
from tests.engine.runtime.scripted_hour import (
    BEGIN,
    NUM_BLOCKS,
    Hour,
    Samples,
    expected,
    histogram,
    make_hour,
    play,
)

KEY = "sk-hour"
HTTP_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
ASKED = (
    ("GET", "/health", "2xx", "/health", 0.0625),
    ("GET", "/health", "2xx", "/health", 0.25),
    ("POST", "/health", "4xx", "/health", 0.125),
    ("GET", "/v1/models?key=none", "4xx", "none", 0.5),
    ("GET", "/nowhere", "4xx", "none", 0.0),
    ("GET", "/v1/models", "2xx", "/v1/models", 2.0),
)
"""Requests over HTTP: method, path, status, the route that they count for, and seconds that they take."""


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
                found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


@pytest.fixture
def hour(monkeypatch: pytest.MonkeyPatch) -> Hour:
    return make_hour(monkeypatch)


async def _asked_over_http(hour: Hour) -> str:
    """Every request of :data:`ASKED`, then what /metrics answers."""
    llm = FakeLLM()
    llm.metrics = hour.metrics
    app = create_app(served(llm), ServerOptions(api_keys=(KEY,)))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", trust_env=False) as client:
        for method, path, status, _, _ in ASKED:
            headers = {} if "none" in path else {"Authorization": f"Bearer {KEY}"}
            response = await client.request(method, path, headers=headers)
            assert f"{response.status_code // 100}xx" == status, path
        return (await client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})).text


def expected_over_http() -> Samples:
    found: Samples = {}
    for method, _, status, handler, _ in ASKED:
        name = "http_requests_total", (("handler", handler), ("method", method), ("status", status))
        found[name] = found.get(name, 0) + 1
    for handler in {asked[3] for asked in ASKED}:
        seconds = [asked[4] for asked in ASKED if asked[3] == handler]
        found |= histogram("http_request_duration_seconds", seconds, HTTP_BOUNDS, handler=handler)
    return found


def test_every_sample_of_metrics_after_an_hour_is_what_arithmetic_says(
    hour: Hour, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in play(hour):
        pass
    assert hour.clock() == BEGIN + 3600
    times = iter([moment for *_, seconds in ASKED for moment in (0.0, seconds)] + [0.0, 0.0])
    monkeypatch.setattr(http_metrics, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    found = samples(asyncio.run(_asked_over_http(hour)))
    wanted = {**expected(hour), **expected_over_http()}
    assert {name for name, _ in found} == {name for name, _ in wanted}, "a metric that the script does not check"
    assert found == wanted


def test_gauges_say_what_is_so_at_every_moment_of_the_hour(hour: Hour) -> None:
    for moment, running, waiting, pages in play(hour):
        found = samples(hour.metrics.render().decode())
        gauges = [found[f"vllm:{name}", ()] for name in ("num_requests_running", "num_requests_waiting")]
        assert gauges == [running, waiting], moment
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
            assert found[f"vllm:{name}", ()] == pages / NUM_BLOCKS, moment


def test_gauges_are_at_rest_once_the_engine_is_closed(hour: Hour) -> None:
    hour.ask("cut short", range(1, 9), 4)
    hour.step()
    hour.engine.close()
    found = samples(hour.metrics.render().decode())
    assert [found[f"vllm:{name}", ()] for name in ("num_requests_running", "kv_cache_usage_perc")] == [0, 0]


def test_the_engines_counters_agree_with_its_metrics(hour: Hour) -> None:
    for _ in play(hour):
        pass
    found, stats = samples(hour.metrics.render().decode()), hour.engine.stats()
    assert stats.prefix_queries == found["vllm:prefix_cache_queries_total", ()]
    assert stats.prefix_hits == found["vllm:prefix_cache_hits_total", ()]
    assert stats.num_preemptions == found["vllm:num_preemptions_total", ()]
    assert stats.generation_tokens == found["vllm:generation_tokens_total", ()]
    assert stats.prompt_tokens == found["vllm:prompt_tokens_by_source_total", (("source", "local_compute"),)]


def test_the_log_of_the_hour_names_each_request_that_did_not_end_by_itself(
    hour: Hour, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "engine"):
        for _ in play(hour):
            pass
    for line in hour.ledger:
        named = [record for record in caplog.messages if line.name in record]
        assert len(named) == (line.reason in ("abort", "error")), line.name
