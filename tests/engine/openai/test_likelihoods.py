"""What evaluation programs send to /v1/completions, against a dense forward in float64."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest

from engine import LLM
from tests.engine.openai.conftest import KEY, http_client
from tests.engine.parity.dense_oracle import DenseLlama

CONTEXTS = ("The river said: 世界.", "One, two, three 😀 and", "naïve → ")
CONTINUATIONS = (" a winter garden", " こんにちは, мир", "½ 😀", "\n")


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is surer of its tokens: where one is likely, sums lose the others."""
    made = tmp_path_factory.mktemp("surer")
    shutil.copytree(tiny_model_dir("llama"), made, dirs_exist_ok=True)
    weights = mx.load(str(made / "model.safetensors"))
    assert isinstance(weights, dict)
    changed = {name: 3 * weight if name == "model.norm.weight" else weight for name, weight in weights.items()}
    mx.eval(changed)
    mx.save_safetensors(str(made / "model.safetensors"), changed, metadata={"format": "mlx"})
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), max_model_len=256, gpu_memory_utilization=0.2) as made:
        yield made


@pytest.fixture(scope="module")
def http(llm: LLM) -> Iterator[httpx.Client]:
    with http_client(llm.serve(api_key=KEY)) as made:
        yield made


@pytest.fixture(scope="module")
def dense(folder: Path) -> DenseLlama:
    return DenseLlama(folder)


def likelihoods(http: httpx.Client, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[tuple[float, bool]]:
    """As lm-eval asks and reads: the prompt's own values from ``lengths`` on, and whether each is the largest there."""
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    found = []
    for choice, length in zip(http.post("/v1/completions", json=body).json()["choices"], lengths, strict=True):
        values = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        found.append((sum(values), is_greedy))
    return found


def expected(dense: DenseLlama, token_ids: list[int], length: int) -> tuple[float, bool]:
    rows = dense.logprobs(token_ids)[length - 1 : -1]
    taken = token_ids[length:]
    return math.fsum(rows[range(len(taken)), taken]), bool((rows.argmax(-1) == taken).all())


def test_loglikelihoods_are_those_of_a_dense_float64_forward(llm: LLM, http: httpx.Client, dense: DenseLlama) -> None:
    cases = [
        (llm.tokenizer.encode(context) + llm.tokenizer.encode(continuation), len(llm.tokenizer.encode(context)))
        for context in CONTEXTS
        for continuation in CONTINUATIONS
    ]
    prompts, lengths = [list(ids) for ids, _ in cases], [length for _, length in cases]
    for (ids, length), found in zip(cases, likelihoods(http, prompts, lengths), strict=True):
        wanted = expected(dense, ids, length)
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)
        assert found[1] == wanted[1]


def test_a_rolling_likelihood_and_a_score_are_those_of_a_dense_float64_forward(
    llm: LLM, http: httpx.Client, dense: DenseLlama
) -> None:
    text = " ".join(CONTEXTS) + "".join(CONTINUATIONS)
    ids = llm.tokenizer.encode(text)
    wanted, _ = expected(dense, ids, 1)
    assert likelihoods(http, [ids], [1])[0][0] == pytest.approx(wanted, abs=2e-4)
    assert llm.score(text).total == pytest.approx(wanted, abs=2e-4)
    each = np.array(llm.score(text).logprobs[1:], float)
    np.testing.assert_allclose(each, dense.logprobs(ids)[range(len(ids) - 1), ids[1:]], atol=1e-4)


def test_what_is_generated_has_the_dense_forwards_values(llm: LLM, http: httpx.Client, dense: DenseLlama) -> None:
    ids = llm.tokenizer.encode(CONTEXTS[0])
    body = {
        "prompt": ids,
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": 3,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    rows = dense.logprobs([*ids, *choice["token_ids"]])[len(ids) - 1 : -1]
    assert choice["token_ids"] == rows.argmax(-1).tolist()
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], rows.max(-1), atol=1e-4)
