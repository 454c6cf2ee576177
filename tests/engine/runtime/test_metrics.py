"""Engine metrics: vLLM's names and labels."""

from prometheus_client.parser import text_string_to_metric_families

from engine.outputs import RequestMetrics
from engine.runtime.metrics import EngineMetrics

GAUGES = "num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc"
COUNTERS = (
    "prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total prompt_tokens_total "
    "prompt_tokens_by_source_total generation_tokens_total request_success_total"
)
HISTOGRAMS = (
    "time_to_first_token_seconds inter_token_latency_seconds time_per_output_token_seconds "
    "request_time_per_output_token_seconds request_prefill_kv_computed_tokens "
    "e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds "
    "request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens request_generation_tokens "
    "request_max_num_generation_tokens request_params_n request_params_max_tokens iteration_tokens_total"
)


def samples(metrics: EngineMetrics) -> dict[tuple[str, str], float]:
    """(sample name, last label's value) -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert sample.labels["engine"] == "0"
            assert sample.labels.get("model_name", "m") == "m"
            own = [value for name, value in sample.labels.items() if name not in ("model_name", "engine")]
            found[sample.name, own[0] if own else ""] = sample.value
    return found


def finished_metrics() -> EngineMetrics:
    metrics = EngineMetrics("m", max_model_len=100)
    times = RequestMetrics(
        arrival_time=10.0, scheduled_time=11.0, first_token_time=13.0, last_token_time=17.0, finished_time=18.0
    )
    metrics.observe_finished(times, 7, 5, 16, "length")
    metrics.observe_closed(2, 5)
    return metrics


def test_all_of_vllms_names_are_there_from_the_start() -> None:
    names = {name for name, _ in samples(EngineMetrics("m"))}
    for name in (GAUGES + " " + COUNTERS).split():
        assert f"vllm:{name}" in names, name
    for name in HISTOGRAMS.split():
        assert {f"vllm:{name}_bucket", f"vllm:{name}_sum", f"vllm:{name}_count"} <= names, name


def test_a_finished_request_fills_every_span() -> None:
    found = samples(finished_metrics())
    sums = {name.removesuffix("_sum"): value for (name, _), value in found.items() if name.endswith("_sum")}
    assert sums["vllm:e2e_request_latency_seconds"] == 8
    assert sums["vllm:request_queue_time_seconds"] == 1
    assert sums["vllm:request_prefill_time_seconds"] == 2
    assert sums["vllm:request_decode_time_seconds"] == 4
    assert sums["vllm:request_inference_time_seconds"] == 6
    assert sums["vllm:request_time_per_output_token_seconds"] == 1
    assert (sums["vllm:request_prompt_tokens"], sums["vllm:request_generation_tokens"]) == (7, 5)
    assert (sums["vllm:request_params_n"], sums["vllm:request_params_max_tokens"]) == (2, 16)
    assert found["vllm:request_success_total", "length"] == 1
    assert found["vllm:request_success_total", "stop"] == 0


def test_a_request_that_never_ran_counts_without_times() -> None:
    metrics = EngineMetrics("m")
    metrics.observe_finished(RequestMetrics(arrival_time=1.0), 3, 0, None, "abort")
    found = samples(metrics)
    assert found["vllm:request_success_total", "abort"] == 1
    assert found["vllm:request_decode_time_seconds_count", ""] == 0
    assert found["vllm:request_params_max_tokens_count", ""] == 0


def test_steps_state_and_cache_hits_are_counted() -> None:
    metrics = EngineMetrics("m")
    metrics.observe_step(32, 4)
    metrics.observe_prefix(40, 8)
    metrics.observe_preemptions(1)
    metrics.observe_first_token(0.5)
    metrics.observe_inter_token(0.02)
    metrics.set_state(3, 2, 0.25)
    metrics.set_cache_config(block_size=16, num_gpu_blocks=100)
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total", ""] == 40
    assert found["vllm:generation_tokens_total", ""] == 4
    assert found["vllm:iteration_tokens_total_sum", ""] == 36
    assert found["vllm:prompt_tokens_by_source_total", "local_compute"] == 32
    assert found["vllm:prompt_tokens_by_source_total", "local_cache_hit"] == 8
    assert found["vllm:prefix_cache_queries_total", ""] == 40
    assert found["vllm:prefix_cache_hits_total", ""] == 8
    assert found["vllm:request_prefill_kv_computed_tokens_sum", ""] == 32
    assert found["vllm:num_preemptions_total", ""] == 1
    assert found["vllm:time_to_first_token_seconds_sum", ""] == 0.5
    assert found["vllm:inter_token_latency_seconds_sum", ""] == 0.02
    assert found["vllm:num_requests_running", ""] == 3
    assert found["vllm:num_requests_waiting", ""] == 2
    assert found["vllm:kv_cache_usage_perc", ""] == 0.25
    assert found["vllm:cache_config_info", "16"] == 1


def test_boards_that_know_the_old_names_find_them() -> None:
    metrics = EngineMetrics("m")
    metrics.observe_inter_token(0.02)
    metrics.set_state(3, 2, 0.25)
    found = samples(metrics)
    assert found["vllm:time_per_output_token_seconds_sum", ""] == 0.02
    assert found["vllm:gpu_cache_usage_perc", ""] == 0.25


def test_two_engines_do_not_share_their_counts() -> None:
    first, second = EngineMetrics("m"), EngineMetrics("m")
    first.observe_preemptions(1)
    assert samples(second)["vllm:num_preemptions_total", ""] == 0
