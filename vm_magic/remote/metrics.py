"""A remote server's Prometheus text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from vm_magic.remote.llm import ServerState

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")


@dataclass(frozen=True)
class RemoteMetrics:
    """The text as ``metrics_table`` reads a registry."""

    text: str

    def collect(self) -> Iterator[Any]:
        """Metric families. Raises RequestError for what is no Prometheus text."""
        from prometheus_client.parser import text_string_to_metric_families

        try:
            yield from text_string_to_metric_families(self.text)
        except ValueError as error:
            raise RequestError(f"the server's /metrics cannot be read: {error}") from None


def read_state(text: str, model: str) -> ServerState:
    """Running and waiting requests and KV usage: sums over the engines of ``model``, the fullest cache."""
    values: dict[str, list[float]] = {}
    for family in RemoteMetrics(text).collect():
        for sample in family.samples:
            if sample.labels.get("model_name", model) == model:
                values.setdefault(sample.name, []).append(sample.value)
    usage = next((max(values[name]) for name in KV_USAGE if name in values), None)
    running, waiting = (int(sum(values[name])) if name in values else None for name in (RUNNING, WAITING))
    return ServerState(running, waiting, usage)
