"""The engine's Prometheus metrics under vLLM's names, in a registry of their own."""

import bisect
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from engine.outputs import RequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of :meth:`EngineMetrics.render`."""

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N_BUCKETS = (1, 2, 5, 10, 20)
_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


class EngineMetrics:
    """What one engine counts and measures. Times are seconds; thread-safe; made once per engine."""

    def __init__(self, model_name: str, *, max_model_len: int = 131072) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._cache_config: dict[str, str] = {}
        self._cache_info: Gauge | None = None
        self._make_state()
        self._make_counters()
        self._make_times()
        self._make_sizes(_one_two_five(max_model_len))

    def _make_state(self) -> None:
        self._running = self._gauge("num_requests_running", "Requests in the current batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting to be processed.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self._old_kv_usage = self._gauge("gpu_cache_usage_perc", "The old name of kv_cache_usage_perc.")

    def _make_counters(self) -> None:
        self._prefix_queries = self._counter("prefix_cache_queries", "Prefix cache queries, in tokens.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prefix cache hits, in tokens.")
        self._preemptions = self._counter("num_preemptions", "Preemptions so far.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prefill tokens processed.")
        self._generation_tokens = self._counter("generation_tokens", "Generation tokens processed.")
        by_source = self._counter_family("prompt_tokens_by_source", "Prompt tokens by where they came from.", "source")
        self._computed = by_source.labels(**self._labels, source="local_compute")
        self._cached = by_source.labels(**self._labels, source="local_cache_hit")
        success = self._counter_family("request_success", "Requests that ended, by reason.", "finished_reason")
        self._finished = {reason: success.labels(**self._labels, finished_reason=reason) for reason in FINISH_REASONS}

    def _make_times(self) -> None:
        histogram = self._histogram
        self._first_token = histogram("time_to_first_token_seconds", "Time to first token.", _FIRST_TOKEN_BUCKETS)
        self._inter_token = _TokenTimes(
            {
                "vllm:inter_token_latency_seconds": "Time between two tokens.",
                "vllm:time_per_output_token_seconds": "The old name of inter_token_latency_seconds.",
            },
            self._labels,
            _TOKEN_BUCKETS,
        )
        self.registry.register(self._inter_token)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Time per output token of a request, its mean.", _TOKEN_BUCKETS
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Time from arrival to the end.", _REQUEST_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Time spent waiting.", _REQUEST_BUCKETS)
        self._inference = histogram("request_inference_time_seconds", "Time spent running.", _REQUEST_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "Time spent in prefill.", _REQUEST_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "Time spent in decode.", _REQUEST_BUCKETS)

    def _make_sizes(self, buckets: Sequence[int]) -> None:
        histogram = self._histogram
        self._request_prompt = histogram("request_prompt_tokens", "Prefill tokens of a request.", buckets)
        self._request_generation = histogram("request_generation_tokens", "Generation tokens of a request.", buckets)
        self._request_longest = histogram(
            "request_max_num_generation_tokens", "Generation tokens of a request's longest completion.", buckets
        )
        self._request_computed = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that no cache held.", buckets
        )
        self._params_n = histogram("request_params_n", "The n request parameter.", _N_BUCKETS)
        self._params_max_tokens = histogram("request_params_max_tokens", "The max_tokens request parameter.", buckets)
        self._step_tokens = histogram("iteration_tokens_total", "Tokens per engine step.", _STEP_BUCKETS)

    def set_cache_config(self, **config: object) -> None:
        """Publish the cache's configuration as labels (``block_size``, ``num_gpu_blocks`` …).

        A later call says only what changed.
        """
        self._cache_config |= {name: str(value) for name, value in config.items()}
        labels = {"engine": "0", **self._cache_config}
        if self._cache_info is None:
            text = "Information of the LLMEngine CacheConfig."
            self._cache_info = Gauge("vllm:cache_config_info", text, list(labels), registry=self.registry)
        self._cache_info.clear()
        self._cache_info.labels(**labels).set(1)

    def set_state(self, running: int, waiting: int, kv_usage: float) -> None:
        """How many requests run and wait, and the used share of the KV cache (0 to 1)."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)
        self._old_kv_usage.set(kv_usage)

    def observe_step(self, num_prompt_tokens: int, num_generation_tokens: int) -> None:
        """One engine step: prompt tokens computed and tokens generated."""
        self._generation_tokens.inc(num_generation_tokens)
        self._step_tokens.observe(num_prompt_tokens + num_generation_tokens)

    def observe_first_token(self, seconds: float) -> None:
        """Time from a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float, count: int = 1) -> None:
        """Time between two tokens of one completion, or of ``count`` of them that run together."""
        self._inter_token.observe(seconds, count)

    def observe_prefix(self, queries: int, hits: int) -> None:
        """A request's prompt tokens looked up in the prefix cache, and found there."""
        self._prompt_tokens.inc(queries)
        self._prefix_queries.inc(queries)
        self._prefix_hits.inc(hits)
        self._computed.inc(queries - hits)
        self._cached.inc(hits)
        self._request_computed.observe(queries - hits)

    def observe_preemptions(self, number: int) -> None:
        """So many more completions lost their blocks to others."""
        self._preemptions.inc(number)

    def observe_finished(
        self,
        metrics: RequestMetrics,
        num_prompt: int,
        num_generated: int,
        max_tokens: int | None,
        finish_reason: str,
    ) -> None:
        """One completion ended. ``num_generated`` counts its tokens, times are read from ``metrics``."""
        self._finished[finish_reason].inc()
        self._request_prompt.observe(num_prompt)
        self._request_generation.observe(num_generated)
        if max_tokens is not None:
            self._params_max_tokens.observe(max_tokens)
        scheduled, first, last = metrics.scheduled_time, metrics.first_token_time, metrics.last_token_time
        _observe_span(self._e2e, metrics.arrival_time, metrics.finished_time)
        _observe_span(self._queue, metrics.arrival_time, scheduled)
        _observe_span(self._prefill, scheduled, first)
        _observe_span(self._inference, scheduled, last)
        _observe_span(self._decode, first, last)
        if first is not None and last is not None and num_generated > 1:
            self._per_token.observe((last - first) / (num_generated - 1))

    def observe_closed(self, n: int, longest: int) -> None:
        """The last of a request's ``n`` completions ended; the ``longest`` has so many tokens."""
        self._params_n.observe(n)
        self._request_longest.observe(longest)

    def render(self) -> bytes:
        """All metrics as Prometheus text (:data:`CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._labelled(Gauge(f"vllm:{name}", text, list(self._labels), registry=self.registry))

    def _counter(self, name: str, text: str) -> Counter:
        return self._labelled(Counter(f"vllm:{name}", text, list(self._labels), registry=self.registry))

    def _counter_family(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"vllm:{name}", text, [*self._labels, label], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return self._labelled(
            Histogram(f"vllm:{name}", text, list(self._labels), buckets=buckets, registry=self.registry)
        )

    def _labelled(self, metric: _Metric) -> _Metric:
        return metric.labels(**self._labels)


class _TokenTimes(Collector):
    """A histogram, shown under several names, that takes many equal values at once.

    ``names`` maps each name to its help text. prometheus_client's own takes them one by one, and the
    requests of a batch all have their tokens at the same times.
    """

    def __init__(self, names: Mapping[str, str], labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        self._names = names
        self._labels = labels
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._created = time.time()
        self._lock = threading.Lock()

    def observe(self, value: float, count: int) -> None:
        """Count ``value`` so many times."""
        bucket = bisect.bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += count
            self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The histogram under each of its names."""
        with self._lock:
            upto, total = list(itertools.accumulate(self._counts)), self._sum
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        for name, text in self._names.items():
            family = HistogramMetricFamily(name, text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), list(zip(bounds, upto, strict=True)), total)
            family.add_sample(f"{name}_created", dict(self._labels), self._created)
            yield family


def _observe_span(histogram: Histogram, begin: float | None, end: float | None) -> None:
    if begin is not None and end is not None:
        histogram.observe(end - begin)


def _one_two_five(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … up to ``largest``."""
    buckets, power = [], 1
    while power <= largest:
        buckets += [step * power for step in (1, 2, 5) if step * power <= largest]
        power *= 10
    return buckets
