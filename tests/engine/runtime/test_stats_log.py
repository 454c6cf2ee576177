"""The periodic line, with a clock of its own."""

import logging
from dataclasses import replace

from engine.runtime.activity import EngineStats
from engine.runtime.stats_log import StatsLog


def test_the_line_has_vllms_words_and_the_rates_of_its_interval(caplog):
    now, stats = [0.0], [EngineStats()]
    log = StatsLog(lambda: stats[0], lambda: now[0])
    caplog.set_level(logging.INFO, "engine")
    now[0] = 5.0
    stats[0] = EngineStats(num_running=1, kv_cache_usage=0.002, prompt_tokens=539, generation_tokens=1,
                           prefix_queries=539, prefix_hits=54)  # fmt: skip
    log.tick(idle=False)
    assert not caplog.messages
    now[0] = 10.0
    log.tick(idle=False)
    assert caplog.messages == [
        "Engine 000: Avg prompt throughput: 53.9 tokens/s, Avg generation throughput: 0.1 tokens/s, "
        "Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.2%, Prefix cache hit rate: 10.0%"
    ]
    now[0] = 11.0
    stats[0] = replace(stats[0], num_running=0, generation_tokens=5)
    log.tick(idle=True)
    assert "Avg generation throughput: 4.0 tokens/s, Running: 0 reqs" in caplog.messages[-1]


def test_nothing_new_is_not_logged(caplog):
    now = [0.0]
    log = StatsLog(EngineStats, lambda: now[0])
    caplog.set_level(logging.INFO, "engine")
    now[0] = 60.0
    log.tick(idle=True)
    assert not caplog.messages
