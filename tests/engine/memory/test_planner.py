import dataclasses
import random

import pytest

from engine.errors import ConfigError, MemoryPlanError
from engine.memory.cache_spec import (
    FullAttentionSpec,
    KVVectors,
    MLAAttentionSpec,
    SharedSpec,
    SlidingWindowSpec,
    StateSpec,
)
from engine.memory.plan import BAR_WIDTH, MemoryPlan, PlanInputs, bar, parts
from engine.memory.planner import MIN_POOL_BLOCKS, next_pool_size, what_if
from engine.memory.step_cost import StepCost
from engine.params.engine_args import EngineArgs
from tests.memory_plans import make_plan

LIMIT = 51.54e9
DENSE = FullAttentionSpec(tuple(range(30)), bytes_per_token=225_280)


def seed_plan(**changes) -> MemoryPlan:
    """The seed's first case: a dense model on a 64 GB Mac."""
    given = {
        "groups": [DENSE],
        "device_limit": LIMIT,
        "fraction": 0.90,
        "model_memory": 14.96e9,
        "overhead": 1.13e9,
        "block_size": 16,
        "context_length": 131_072,
    }
    return make_plan(**{**given, **changes})


def test_the_log_line_is_the_seeds_to_the_letter():
    assert seed_plan().log_line() == (
        "metal_limit=51.54GB, fraction=0.90, usable_metal=46.39GB, model_memory=14.96GB, overhead=1.13GB, "
        "kv_budget=30.30GB, per_block_bytes=3604480, num_blocks=8405, max_tokens_cached=134480"
    )


def test_a_negative_budget_is_refused_in_the_seeds_words_with_the_flag_that_was_given():
    states = [
        FullAttentionSpec((3,), bytes_per_token=20_480),
        StateSpec((0, 1, 2), state_bytes=64_355_469),
    ]
    with pytest.raises(MemoryPlanError) as refused:
        seed_plan(
            groups=states,
            fraction=0.75,
            model_memory=21.64e9,
            overhead=1.08e9,
            max_num_seqs=256,
            memory_flag="VLLM_METAL_MEMORY_FRACTION",
        )
    assert str(refused.value).startswith(
        "Paged attention: not enough Metal memory for KV cache. metal_limit=51.54GB, fraction=0.75, "
        "usable_metal=38.65GB, model_memory=21.64GB, overhead=1.08GB, kv_budget=-0.54GB. "
        "Mitigations: increase VLLM_METAL_MEMORY_FRACTION, "
    )
    assert "decrease max_num_seqs" in str(refused.value)
    assert refused.value.flag == "VLLM_METAL_MEMORY_FRACTION"
    assert refused.value.kv_budget == pytest.approx(-0.54e9, abs=5e6)


def test_without_states_the_refusal_is_exactly_the_seeds_sentence():
    with pytest.raises(MemoryPlanError) as refused:
        seed_plan(model_memory=46e9, memory_flag="VLLM_METAL_MEMORY_FRACTION")
    assert str(refused.value).endswith(
        "kv_budget=-0.74GB. Mitigations: increase VLLM_METAL_MEMORY_FRACTION, use a smaller or more quantized model."
    )


def test_a_context_that_does_not_fit_is_refused_in_the_seeds_words_with_the_length_that_does():
    with pytest.raises(MemoryPlanError) as refused:
        seed_plan(fraction=0.75, model_memory=15.01e9, overhead=1.08e9)
    assert str(refused.value) == (
        "To serve at least one request with the models's max seq len (131072), (27.5 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (21.01 GiB). Based on the available memory, the estimated maximum "
        "model length is 100160. Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when "
        "initializing the engine. See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
    )
    assert refused.value.max_model_len_that_fits == 100_160
    assert refused.value.kv_bytes_at_max_len == 131_072 * 225_280
    fitting = seed_plan(fraction=0.75, model_memory=15.01e9, overhead=1.08e9, max_model_len=100_160)
    assert fitting.max_model_len == 100_160


def test_max_model_len_auto_takes_the_length_that_the_error_names():
    plan = seed_plan(fraction=0.75, model_memory=15.01e9, overhead=1.08e9, max_model_len="auto")
    assert plan.max_model_len == plan.max_model_len_that_fits == 100_160


def test_fewer_than_sixteen_blocks_are_refused_and_sixteen_are_not():
    def limit(num_blocks: int) -> dict[str, float]:
        return {"device_limit": num_blocks * 3_604_480, "fraction": 1.0, "model_memory": 0, "overhead": 0}

    assert seed_plan(**limit(16), max_model_len="auto").num_blocks == 16
    with pytest.raises(MemoryPlanError, match=r"num_blocks too low \(15 < minimum 16\)") as refused:
        seed_plan(**limit(15), max_model_len="auto")
    assert refused.value.num_blocks == 15


def test_max_model_len_unset_is_the_context_and_auto_never_exceeds_it():
    assert seed_plan().max_model_len == 131_072
    assert seed_plan(max_model_len="auto").max_model_len == 131_072
    assert seed_plan(context_length=4096, max_model_len="auto").max_model_len == 4096
    assert seed_plan(context_length=4096).max_model_len_that_fits == 4096


def test_a_length_beyond_the_models_context_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"max_model_len \(200000\) is greater than .*131072") as refused:
        seed_plan(max_model_len=200_000)
    assert refused.value.flag == "max_model_len"


def test_max_num_seqs_auto_is_what_fits_at_a_typical_length_and_at_most_256():
    assert seed_plan().max_num_seqs == 30_296_000_000 // (2048 * 225_280)
    small = FullAttentionSpec((0,), bytes_per_token=1000)
    assert seed_plan(groups=[small]).max_num_seqs == 256
    assert seed_plan(max_num_seqs=7).max_num_seqs == 7


def test_max_num_seqs_auto_is_never_an_error_while_one_sequence_fits():
    rng = random.Random(0)
    for _ in range(300):
        groups = [
            FullAttentionSpec((0,), bytes_per_token=rng.randint(1, 300_000)),
            SlidingWindowSpec((1,), bytes_per_token=rng.randint(1, 300_000), window=rng.randint(1, 4096)),
            StateSpec((2,), state_bytes=rng.randint(0, 200_000_000)),
        ]
        limit = rng.randint(10**8, 10**11)
        length = rng.randint(256, 131_072)
        alone = sum(group.bytes_per_sequence(length) for group in groups)
        given = {"groups": groups, "device_limit": limit, "fraction": 1.0, "model_memory": 0, "overhead": 0}
        if alone > limit:
            with pytest.raises(MemoryPlanError):
                seed_plan(**given, max_model_len=length)
            continue
        plan = seed_plan(**given, max_model_len=length)
        used = plan.num_blocks * plan.per_block_bytes + plan.max_num_seqs * plan.state_bytes_per_seq
        assert used <= limit
        assert plan.num_blocks * 16 >= length
        assert 1 <= plan.max_num_seqs <= 256
        assert plan.max_model_len_that_fits >= length


def test_the_longest_that_fits_is_the_longest():
    rng = random.Random(1)
    for _ in range(100):
        groups = [
            FullAttentionSpec((0,), bytes_per_token=rng.randint(1000, 300_000)),
            SlidingWindowSpec((1,), bytes_per_token=rng.randint(1, 9000), window=rng.randint(1, 4096)),
        ]
        given = {"groups": groups, "fraction": 1.0, "model_memory": 0, "overhead": 0, "max_num_seqs": rng.randint(1, 4)}
        given["device_limit"] = rng.randint(10**9, 10**10)
        longest = seed_plan(**given, max_model_len="auto").max_model_len
        assert seed_plan(**given, max_model_len=longest).max_model_len == longest
        if longest < 131_072:
            with pytest.raises(MemoryPlanError):
                seed_plan(**given, max_model_len=longest + 1)


def test_gemma_4s_sliding_layers_are_billed_for_their_window_only_so_131072_tokens_fit():
    groups = [
        FullAttentionSpec(tuple(range(5, 30, 6)), bytes_per_token=20_480),
        SlidingWindowSpec(tuple(i for i in range(30) if i % 6 != 5), bytes_per_token=204_800, window=1024),
    ]
    given = {"fraction": 0.75, "model_memory": 15.0e9, "overhead": 1.08e9}
    with pytest.raises(MemoryPlanError):
        seed_plan(**given)
    plan = seed_plan(groups=groups, **given)
    assert plan.max_model_len == 131_072
    assert plan.kv_bytes_at_max_len < 3 * 2**30
    assert plan.state_bytes_per_seq == 65 * 16 * 204_800
    assert plan.max_num_seqs > 30


@pytest.mark.parametrize(("model_memory", "state"), [(22.75e9, 63_000_000), (26.19e9, 154_000_000)])
def test_qwen_3_6s_states_are_set_aside_for_the_sequences_that_fit_not_for_256(model_memory, state):
    groups = [FullAttentionSpec((3,), bytes_per_token=40_960), StateSpec((0, 1, 2), state_bytes=state)]
    given = {"groups": groups, "fraction": 0.75, "model_memory": model_memory, "overhead": 1.1e9}
    with pytest.raises(MemoryPlanError):
        seed_plan(**given, max_num_seqs=256, max_model_len=32_768)
    plan = seed_plan(**given, max_model_len=32_768)
    assert plan.max_num_seqs > 10
    assert plan.num_checkpoints == 1 + plan.max_num_seqs // 8
    slots = plan.max_num_seqs + plan.num_checkpoints
    assert plan.kv_budget == plan.usable - plan.model_memory - plan.overhead - slots * state
    assert slots * state == plan.state_memory == plan.bytes_of(groups[1])
    without = seed_plan(**given, max_model_len=32_768, prefix_caching=False)
    assert (without.num_checkpoints, without.state_memory) == (0, without.max_num_seqs * state)


def test_checkpoints_never_cost_the_one_sequence_that_fits():
    """A budget of one state and one sequence's blocks, and 0 to 2 states more."""
    groups = [FullAttentionSpec((3,), bytes_per_token=1000), StateSpec((0,), state_bytes=10**6)]
    for spare in range(3):
        budget = 16 * 16 * 1000 + (1 + spare) * 10**6
        plan = make_plan(groups=groups, device_limit=budget, fraction=1.0, context_length=256, max_num_seqs=1)
        assert (plan.max_num_seqs, plan.num_checkpoints) == (1, min(spare, 1))


def test_shared_layers_cost_nothing_and_latent_ones_grow_like_full_ones():
    shared = seed_plan(groups=[DENSE, SharedSpec((30, 31))])
    assert dataclasses.replace(shared, groups=(DENSE,), inputs=seed_plan().inputs) == seed_plan()
    latent = seed_plan(groups=[MLAAttentionSpec((0,), bytes_per_token=1152)])
    assert latent.per_block_bytes == 16 * 1152


def test_a_model_without_growing_layers_gets_blocks_that_cost_nothing():
    plan = seed_plan(groups=[StateSpec((0,), state_bytes=10**8)], max_model_len="auto")
    assert plan.max_model_len == 131_072
    assert plan.num_blocks == plan.max_num_seqs * 8192
    assert plan.state_memory <= plan.usable


def test_the_error_carries_every_number_of_the_plan():
    with pytest.raises(MemoryPlanError) as refused:
        seed_plan(fraction=0.5)
    for field in dataclasses.fields(MemoryPlan):
        assert getattr(refused.value, field.name) is not None
    with pytest.raises(AttributeError):
        _ = refused.value.no_such_number


def test_the_text_for_people_shows_every_part_and_every_group():
    plan = seed_plan(groups=[FULL, SLIDING, StateSpec((0, 1, 2, 5), state_bytes=10**6)])
    text = str(plan)
    assert plan.log_line() in text
    for words in ("device", "51.54GB", "weights", "14.96GB", "sliding windows", "states", "KV cache", "kept free"):
        assert words in text
    assert f"{plan.num_blocks:,} blocks × 16 tokens = {plan.max_tokens_cached:,} tokens (65,536 bytes a block)" in text
    assert "max_num_seqs" in text
    assert f"max_model_len 131,072: {plan.max_concurrency:.2f} requests of full length at once" in text
    table = [line.split() for line in text.splitlines()[-6:-2]]
    assert [row[0] for row in table] == ["group", "full", "sliding", "state"]
    assert table[1][3] == "4,096B"
    assert table[2][-2] == f"{plan.num_blocks_of(SLIDING):,}"
    assert "4 (0-2, 5)" in text
    assert f"{plan.max_num_seqs + plan.num_checkpoints} slots" in text


def test_the_bar_has_one_cell_at_least_for_every_part_and_always_its_width():
    rng = random.Random(2)
    for _ in range(200):
        model = rng.randint(1, 20 * 10**9)
        plan = seed_plan(groups=[FULL, SLIDING], model_memory=model, overhead=rng.randint(1, 10**10))
        found = bar(plan)
        pieces = [part for part in parts(plan) if part.num_bytes]
        assert len(found) == BAR_WIDTH
        assert len(set(found)) == len(pieces) == 5
        assert abs(found.count("█") - 64 * model / LIMIT) <= 3


def test_groups_and_parts_say_the_same_bytes():
    state = StateSpec((0,), state_bytes=10**6)
    plan = seed_plan(groups=[FULL, SLIDING, state, SharedSpec((7,))], max_num_seqs=9)
    sizes = {part.kind: part.num_bytes for part in parts(plan)}
    assert plan.bytes_of(SLIDING) == sizes["windows"] == 9 * 65 * 16 * 8192
    assert plan.bytes_of(state) == sizes["states"] == (9 + 2) * 10**6
    assert 0 <= sizes["kv"] - plan.bytes_of(FULL) < plan.per_block_bytes
    assert plan.bytes_of(plan.groups[3]) == plan.num_blocks_of(plan.groups[3]) == 0


def test_a_terminal_shows_the_plan_as_its_text():
    pretty = pytest.importorskip("IPython.lib.pretty")
    assert pretty.pretty(seed_plan()) == str(seed_plan())


def test_parts_of_the_device_add_up_to_the_whole():
    plan = seed_plan(groups=[DENSE, StateSpec((30,), state_bytes=10**6)])
    assert sum(part.num_bytes for part in parts(plan)) == plan.device_limit


def test_a_pool_grows_geometrically_and_never_past_its_limit():
    size, steps = 0, 0
    for needed in range(1, 8406):
        grown = next_pool_size(size, needed, 8405)
        steps += grown != size
        assert max(needed, size) <= grown <= 8405
        size = grown
    assert size == 8405
    assert steps <= 9
    assert next_pool_size(0, 1, 8405) == MIN_POOL_BLOCKS
    assert next_pool_size(100, 5000, 8405) == 5000
    with pytest.raises(AssertionError):
        next_pool_size(10, 21, 20)


SLIDING = SlidingWindowSpec((30,), bytes_per_token=8192, window=1024, vectors=(KVVectors(8, 256, 2),) * 2)
FULL = FullAttentionSpec((31,), bytes_per_token=4096, vectors=(KVVectors(2, 512, 2),) * 2)


def test_what_if_changes_one_setting_and_plans_as_if_asked_for_at_once():
    plan = seed_plan(groups=[FULL, SLIDING])
    given = {"groups": [FULL, SLIDING]}
    assert what_if(plan) == plan
    assert what_if(plan, max_model_len=4096, max_num_seqs=3) == seed_plan(**given, max_model_len=4096, max_num_seqs=3)
    assert what_if(plan, fraction=0.5) == seed_plan(**given, fraction=0.5, memory_flag="memory_fraction")
    assert what_if(what_if(plan, fraction=0.5), fraction="auto").fraction == 0.90


def test_what_if_takes_the_flags_texts_and_refuses_what_is_no_number():
    plan = seed_plan(max_model_len=65_536)
    assert what_if(plan, max_model_len="4K", fraction="0.5") == what_if(plan, max_model_len=4096, fraction=0.5)
    for wrong in ({"fraction": "much"}, {"max_model_len": "long"}, {"max_num_seqs": 2.5}):
        with pytest.raises(ConfigError, match=str(*wrong.values())):
            what_if(plan, **wrong)


def test_what_if_keeps_auto_auto_and_what_was_asked_for_as_it_is():
    plan = seed_plan(max_model_len=65_536)
    assert what_if(plan, fraction=0.8).max_num_seqs < plan.max_num_seqs
    assert what_if(seed_plan(max_model_len=65_536, max_num_seqs=7), fraction=0.8).max_num_seqs == 7
    shorter = what_if(seed_plan(max_model_len="auto"), fraction=0.6)
    assert shorter.max_model_len == shorter.max_model_len_that_fits < 131_072
    assert what_if(shorter, max_model_len=1024, max_num_seqs="auto").max_model_len == 1024


def test_what_if_says_which_length_would_fit_and_what_is_out_of_range():
    with pytest.raises(MemoryPlanError, match="memory_fraction") as refused:
        what_if(seed_plan(), fraction=0.6)
    longest = refused.value.max_model_len_that_fits
    assert what_if(seed_plan(), fraction=0.6, max_model_len=longest).max_model_len == longest
    wrong = [{"fraction": 0}, {"fraction": 1.5}, {"max_model_len": 0}, {"max_num_seqs": 0}, {"kv_cache_dtype": "int3"}]
    for setting in wrong:
        with pytest.raises(ConfigError, match=next(iter(setting)).replace("kv_cache_dtype", "kv-cache-dtype")):
            what_if(seed_plan(), **setting)
    with pytest.raises(ConfigError, match="greater than the derived max_model_len"):
        what_if(seed_plan(), max_model_len=131_073)


def test_what_if_follows_the_pages_element_type():
    plan = seed_plan(groups=[FULL, SLIDING])
    wide = what_if(plan, kv_cache_dtype="float32")
    assert wide.per_block_bytes == 2 * plan.per_block_bytes
    assert wide.state_bytes_per_seq == 2 * plan.state_bytes_per_seq
    assert what_if(wide, kv_cache_dtype="auto") == plan
    with pytest.raises(ConfigError, match="contiguous"):
        what_if(seed_plan(), kv_cache_dtype="float32")


def test_an_explicit_max_num_seqs_that_does_not_fit_is_refused_with_the_number_that_does():
    groups = [FULL, StateSpec((0, 1, 2), state_bytes=154_000_000)]
    for length in (1024, 131_072):
        given = {"groups": groups, "fraction": 0.75, "model_memory": 26.19e9, "max_model_len": length}
        with pytest.raises(MemoryPlanError, match=r"max_num_seqs to \d+ or less") as refused:
            seed_plan(**given, max_num_seqs=256)
        fits = refused.value.max_num_seqs_that_fits
        assert f"max_num_seqs to {fits} or less" in str(refused.value)
        assert seed_plan(**given, max_num_seqs=fits).max_num_seqs == fits
        with pytest.raises(MemoryPlanError):
            seed_plan(**given, max_num_seqs=fits + 1)


def test_every_refusal_says_how_many_bytes_are_missing():
    given = [{"model_memory": 46e9}, {"fraction": 0.5}, {"groups": [FULL, SLIDING], "max_num_seqs": 5000}]
    for change in given:
        with pytest.raises(MemoryPlanError) as refused:
            seed_plan(**change)
        short = refused.value.short_by
        assert short > 0
        less = change.pop("model_memory", 14.96e9) - short
        assert seed_plan(**change, model_memory=less).num_blocks >= 16
        with pytest.raises(MemoryPlanError):
            seed_plan(**change, model_memory=less + refused.value.per_block_bytes)


def test_the_number_of_sequences_that_would_fit_may_be_beyond_what_auto_takes():
    given = {"groups": [DENSE, StateSpec((30,), state_bytes=10**7)], "max_model_len": 2048}
    with pytest.raises(MemoryPlanError, match=r"decrease max_num_seqs to \d+ or less") as refused:
        seed_plan(**given, max_num_seqs=5000)
    fits = refused.value.max_num_seqs_that_fits
    assert 256 < fits < 5000
    assert seed_plan(**given, max_num_seqs=fits).num_blocks * 16 >= 2048
    with pytest.raises(MemoryPlanError):
        seed_plan(**given, max_num_seqs=fits + 1)


def test_a_step_never_has_fewer_tokens_than_sequences():
    assert seed_plan(max_num_batched_tokens=8).max_num_seqs == 8
    with pytest.raises(
        ConfigError, match=r"max_num_batched_tokens \(8\) must be greater than or equal to max_num_seqs"
    ):
        seed_plan(max_num_batched_tokens=8, max_num_seqs=9)
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        what_if(seed_plan(max_num_batched_tokens=8), max_num_seqs=9)


def test_the_verdict_says_how_many_requests_of_full_length_fit_where_it_is_fewer():
    groups = [FullAttentionSpec((0, 1), bytes_per_token=6144, vectors=(KVVectors(24, 128, 2),))]
    plan = make_plan(groups=groups, device_limit=2e9, model_memory=1e9, context_length=32_768, max_num_seqs=16)
    assert plan.max_concurrency < 16
    verdict = f"Fits: 32,768 tokens, up to 16 requests at once ({int(plan.max_concurrency)} of full length)"
    assert str(plan).split("\n")[0] == verdict


def test_the_text_for_people_to_the_letter():
    plan = make_plan(
        groups=[
            FullAttentionSpec((2, 5, 8), bytes_per_token=6144, vectors=(KVVectors(24, 128, 2),)),
            SlidingWindowSpec((0, 1, 3, 4), bytes_per_token=8192, window=1024, ahead=512),
            StateSpec((6, 7, 9, 11, 13, 15, 17, 19, 21, 23), state_bytes=2_000_000),
        ],
        shared_layers=(24, 25), device_limit=16e9, model_memory=3.21e9, overhead=450e6, fraction=0.75,
        context_length=32_768, max_model_len=8192, max_num_seqs=16, memory_flag="memory_fraction",
    )  # fmt: skip
    lines = str(plan).split("\n")
    assert lines[-2:] == ["", f"log line: {plan.log_line()}"]
    assert lines[:-2] == [
        "Fits: 8,192 tokens, up to 16 requests at once",
        "",
        "████████████▓▓▞▒░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░················",
        "    device            16.00GB",
        "  × fraction             0.75  memory_fraction",
        "  = usable            12.00GB",
        "█ − weights            3.21GB  the model",
        "▓ − overhead         450.00MB  activations and buffers of a step",
        "▞ − sliding windows  142.61MB  16 sequences × 8.52MB + 6.29MB for a step's tokens",
        "▒ − states            38.00MB  (16 sequences + 3 checkpoints) × 2.00MB",
        "░ = KV cache           8.16GB  83,001 blocks × 16 tokens = 1,328,016 tokens (98,304 bytes a block)",
        "·   kept free          4.00GB  25% of the device, for everything else",
        "",
        "max_model_len 8,192: 16.00 requests of full length at once, 60.85MB each; longest that fits: 32,768 (the "
        "whole context)",
        "max_num_seqs 16: requests that run at once; others wait",
        "keys and values: 2 bytes an element, the model's own type here; --dtype and --kv-cache-dtype change it",
        "",
        "group    layers                          per token  per sequence        window  block    blocks    memory",
        "full     3 (2, 5, 8)                        6,144B       50.33MB           all     16    83,001    8.16GB",
        "sliding  4 (0-1, 3-4)                       8,192B        8.52MB  1,024 tokens     16     1,088  142.61MB",
        "state    10 (6-7, 9, 11, 13, 15, 17, …)          –        2.00MB             –      –  19 slots   38.00MB",
        "shared   2 (24-25)                               –            0B             –      –         0        0B",
    ]


def test_the_text_for_people_says_what_does_not_fit_and_what_costs_nothing():
    plan = make_plan(groups=[StateSpec((0, 1), state_bytes=10**7)], max_num_seqs=2, prefix_caching=False)
    text = str(plan)
    assert "▒ − states            20.00MB  2 sequences × 10.00MB\n" in text
    assert "512 blocks that cost nothing: no layer keeps tokens\n" in text
    assert "keys and values" not in text
    short = seed_plan(groups=[DENSE], max_model_len=1024, max_num_seqs=1, fraction=0.75, model_memory=30e9)
    assert f"longest that fits: {short.max_model_len_that_fits:,} (of the model's 131,072)" in str(short)
    int8 = make_plan(
        groups=[FullAttentionSpec((0,), bytes_per_token=1024, vectors=(KVVectors(2, 128, 4),))], kv_cache_dtype="int8"
    )
    assert "keys and values: int8; --dtype and --kv-cache-dtype change it" in str(int8)


def test_a_bars_cells_are_in_proportion_and_the_largest_remainders_are_rounded_up():
    def cells(*sizes: int) -> list[int]:
        plan = make_plan(
            groups=[FullAttentionSpec((0,), bytes_per_token=1)], device_limit=sum(sizes), model_memory=sizes[0],
            overhead=sizes[1], fraction=1 - sizes[3] / sum(sizes), max_model_len=64,
        )  # fmt: skip
        found = bar(plan, 16)
        return [found.count(glyph) for glyph in "█▓░·"]

    assert cells(4000, 4000, 4000, 4000) == [4, 4, 4, 4]
    assert cells(1000, 1000, 12_000, 2000) == [1, 1, 12, 2]
    assert cells(2600, 3700, 5300, 4400) == [3, 4, 5, 4]
    assert cells(1, 1, 159_996, 2) == [1, 1, 13, 1]


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.001, 2.0])
def test_a_fraction_out_of_range_is_refused_with_its_value_and_range(fraction: float):
    with pytest.raises(ConfigError, match=r"fraction .*: must be \(0, 1\]") as refused:
        what_if(seed_plan(), fraction=fraction)
    assert (refused.value.flag, refused.value.value, refused.value.allowed) == ("fraction", fraction, "(0, 1]")
    assert what_if(seed_plan(), fraction=1.0).usable == LIMIT


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs"])
def test_a_length_or_number_below_one_is_refused_with_its_value_and_range(name: str):
    with pytest.raises(ConfigError, match=f"{name} 0: must be at least 1, or auto") as refused:
        what_if(seed_plan(), **{name: 0})
    assert (refused.value.flag, refused.value.value, refused.value.allowed) == (name, 0, "[1, ∞)")
    assert getattr(what_if(seed_plan(), **{name: 1}), name) == 1


def test_a_length_beyond_the_models_is_refused_with_its_value_and_range():
    with pytest.raises(ConfigError) as refused:
        seed_plan(max_model_len=131_073)
    assert (refused.value.flag, refused.value.value, refused.value.allowed) == ("max_model_len", 131_073, "[1, 131072]")
    assert seed_plan(fraction=1.0, max_model_len=131_072).max_model_len == 131_072


def test_the_error_carries_the_groups_and_the_inputs_themselves():
    with pytest.raises(MemoryPlanError) as refused:
        seed_plan(fraction=0.5)
    assert refused.value.groups == (DENSE,)
    assert refused.value.inputs.context_length == 131_072


def test_the_longest_length_leaves_room_for_one_checkpoint_if_anything_fits_then():
    """Pages of 1000 bytes a token, states as large as 160 tokens; room for 640 and 320 tokens beside one state."""
    state = 160_000
    given = {
        "groups": [FullAttentionSpec((0,), bytes_per_token=1000), StateSpec((1,), state_bytes=state)],
        "fraction": 1.0, "max_model_len": "auto", "max_num_seqs": 1,
    }  # fmt: skip
    plan = make_plan(**given, device_limit=640_000 + state)
    assert (plan.max_model_len, plan.num_checkpoints, plan.max_model_len_that_fits) == (480, 1, 640)
    assert make_plan(**given, device_limit=640_000 + state, prefix_caching=False).max_model_len == 640
    tight = make_plan(**given, device_limit=320_000 + state)
    assert (tight.max_model_len, tight.num_checkpoints) == (320, 0), "with a checkpoint not even 16 blocks would fit"


def test_a_budget_of_nothing_is_refused_unless_blocks_cost_nothing():
    group, state = FullAttentionSpec((0,), bytes_per_token=1000), StateSpec((0,), state_bytes=10**6)
    alone = {"fraction": 1.0, "model_memory": 10**8, "max_num_seqs": 1, "max_model_len": 256, "prefix_caching": False}
    for budget in (-1, 0):
        with pytest.raises(MemoryPlanError, match="not enough Metal memory for KV cache"):
            make_plan(**alone, groups=[group], device_limit=10**8 + budget)
    with pytest.raises(MemoryPlanError, match=r"num_blocks too low \(0 < minimum 16\)"):
        make_plan(**alone, groups=[group], device_limit=10**8 + 1)
    assert make_plan(**alone, groups=[state], device_limit=10**8 + 10**6).kv_budget == 0


def test_a_refusal_names_the_length_or_the_number_of_sequences_that_fits_only_where_one_does():
    group = FullAttentionSpec((0,), bytes_per_token=1000)
    given = {"groups": [group], "fraction": 1.0, "max_model_len": 4096, "max_num_seqs": 1}
    with pytest.raises(MemoryPlanError) as refused:
        make_plan(**given, device_limit=15 * 16_000)
    assert refused.value.max_model_len_that_fits == 0
    assert "decrease" not in str(refused.value)
    with pytest.raises(MemoryPlanError, match=r"the estimated maximum model length is 320\. Try increasing") as refused:
        make_plan(**given, device_limit=20 * 16_000)
    assert "max_num_seqs" not in str(refused.value)
    windows = [group, SlidingWindowSpec((1,), bytes_per_token=1000, window=1600)]
    with pytest.raises(MemoryPlanError, match=r"decreasing `max_model_len` or max_num_seqs to 7 or less when"):
        make_plan(**{**given, "groups": windows, "max_num_seqs": 8}, device_limit=4_096_000 + 7 * 101 * 16_000 + 9)


def test_a_pool_keeps_its_size_while_it_is_enough_and_doubles_when_it_is_not():
    assert next_pool_size(100, 100, 1000) == 100
    assert next_pool_size(0, 0, 1000) == 0
    assert next_pool_size(100, 101, 1000) == 200
    assert next_pool_size(100, 101, 150) == 150
    assert next_pool_size(100, 300, 1000) == 300
    assert next_pool_size(0, 1, 1000) == MIN_POOL_BLOCKS


def test_a_refusal_for_windows_names_the_length_and_the_number_of_sequences_that_fit():
    groups = [FullAttentionSpec((0,), bytes_per_token=1000), SlidingWindowSpec((1,), bytes_per_token=1000, window=4096)]
    given = {"groups": groups, "device_limit": 20 * 10**6, "fraction": 1.0, "max_num_seqs": 8}
    with pytest.raises(MemoryPlanError) as refused:
        make_plan(**given, max_model_len=4096)
    fits, seqs = refused.value.max_model_len_that_fits, refused.value.max_num_seqs_that_fits
    assert str(refused.value).endswith(
        f"Mitigations: increase gpu_memory_utilization, decrease max_model_len to {fits} or less, "
        f"decrease max_num_seqs to {seqs} or less, use a smaller or more quantized model."
    )
    assert make_plan(**given, max_model_len=fits).max_model_len == fits > 1000
    assert make_plan(**{**given, "max_num_seqs": seqs}, max_model_len=4096).max_num_seqs == seqs == 3


def test_checkpoints_are_whole_and_there_are_none_without_states():
    assert seed_plan().num_checkpoints == 0
    groups = [FullAttentionSpec((3,), bytes_per_token=1000), StateSpec((0,), state_bytes=10**6)]
    plan = make_plan(
        groups=groups, device_limit=16 * 16_000 + 1_500_000, fraction=1.0, context_length=256, max_num_seqs=1
    )
    assert plan.num_checkpoints == 0


def test_auto_takes_one_sequence_where_no_second_one_fits():
    plan = make_plan(groups=[FullAttentionSpec((0,), bytes_per_token=1000)], device_limit=4 * 10**6, fraction=1.0,
                     max_model_len=2048)  # fmt: skip
    assert plan.max_num_seqs == 1


def test_heads_that_no_page_type_holds_are_refused_with_their_size():
    group = FullAttentionSpec((0,), bytes_per_token=1280, vectors=(KVVectors(4, 80, 4),))
    with pytest.raises(ConfigError, match="--kv-cache-dtype int8: head dimension 80"):
        make_plan(groups=[group], kv_cache_dtype="int8")


def test_what_needs_nothing_has_no_cell_in_the_bar_and_every_element_size_is_told():
    vectors = (KVVectors(2, 128, 4), KVVectors(2, 64, 2))
    plan = make_plan(groups=[FullAttentionSpec((0,), bytes_per_token=1280, vectors=vectors)], model_memory=10**8)
    assert sorted(set(bar(plan))) == sorted("█░·")
    assert "keys and values: 2/4 bytes an element" in str(plan)


def test_the_inputs_are_what_the_arguments_ask_for_and_what_the_model_and_device_are():
    args = EngineArgs(
        "m", gpu_memory_utilization=0.7, max_model_len=512, max_num_seqs=7, max_num_batched_tokens=99, block_size=32,
        kv_cache_dtype="int8", enable_prefix_caching=False,
    )  # fmt: skip
    overhead = StepCost(1.0)
    given = {"device_limit": 10**9, "model_memory": 10**8, "shared_layers": (5,), "context_length": 4096}
    inputs = PlanInputs.from_args(args, chunk_size=64, overhead=overhead, groups=[DENSE], **given)
    assert inputs == PlanInputs(
        **given, overhead=overhead, groups=(DENSE,), block_size=32, fraction=0.7, memory_flag="gpu_memory_utilization",
        max_model_len=512, max_num_seqs=7, max_num_batched_tokens=99, kv_cache_dtype="int8", prefix_caching=False,
    )  # fmt: skip
    assert inputs.overhead is overhead
    plain = PlanInputs.from_args(EngineArgs("m"), chunk_size=64, overhead=overhead, groups=[DENSE], **given)
    assert plain.max_num_batched_tokens == EngineArgs("m").batched_tokens(64) != EngineArgs("m").batched_tokens(65)
    assert plain.prefix_caching
