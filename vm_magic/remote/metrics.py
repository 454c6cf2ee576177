"""A remote server's Prometheus text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
GENERATED = "vllm:generation_tokens_total"
PREFIX_QUERIES = ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total")
PREFIX_HITS = ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")
_STATE_NAMES = (RUNNING, WAITING, *KV_USAGE, GENERATED, *PREFIX_QUERIES, *PREFIX_HITS)


@dataclass(frozen=True)
class ServerState:
    """What a vLLM server's ``/metrics`` say now; None where it does not say. ``generation_tokens`` and ``prefix_*``
    (tokens looked up in the prefix cache, and found there) count since the server started."""

    num_running: int | None = None
    num_waiting: int | None = None
    kv_cache_usage: float | None = None
    generation_tokens: float | None = None
    prefix_queries: float | None = None
    prefix_hits: float | None = None

    @property
    def prefix_hit_share(self) -> float | None:
        """Share of the prompts' tokens that the prefix cache had, 0 to 1."""
        if self.prefix_hits is None or not self.prefix_queries:
            return None
        return self.prefix_hits / self.prefix_queries


@dataclass(frozen=True)
class RemoteMetrics:
    """The text as ``metrics_table`` reads a registry."""

    text: str

    def collect(self) -> Iterator[Any]:
        """Metric families. Raises RequestError for what is not Prometheus text."""
        from prometheus_client.parser import text_string_to_metric_families

        try:
            yield from text_string_to_metric_families(self.text)
        except ValueError as error:
            raise RequestError(f"the server's /metrics cannot be read: {error}") from None


def read_state(text: str, model: str) -> ServerState:
    """Requests, KV usage and counters: sums over the engines of ``model``, the fullest cache."""
    # Histograms are most of the text, and reading them costs as much: only the lines asked for are parsed.
    lines = [line for line in text.splitlines() if line.startswith(_STATE_NAMES)]
    values: dict[str, list[float]] = {}
    for family in RemoteMetrics("\n".join([*lines, ""])).collect():
        for sample in family.samples:
            if sample.labels.get("model_name", model) == model:
                values.setdefault(sample.name, []).append(sample.value)

    def total(*names: str) -> float | None:
        return next((sum(values[name]) for name in names if name in values), None)

    usage = next((max(values[name]) for name in KV_USAGE if name in values), None)
    running, waiting = (None if (found := total(name)) is None else int(found) for name in (RUNNING, WAITING))
    return ServerState(running, waiting, usage, total(GENERATED), total(*PREFIX_QUERIES), total(*PREFIX_HITS))
