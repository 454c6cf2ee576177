"""``LLM.map(choices=…)``: labels with their probabilities, compared with mlx-lm's logits for the same tokens."""

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas
import pytest

from engine import LLM
from engine.batch.choices import ChoiceClient, ChoiceColumns, ChoiceJob, read_choices
from engine.batch.map import MapInterrupted
from engine.errors import RequestError
from tests.conftest import ScriptedLLM, TinyModelDir
from tests.engine.parity.oracle import assert_nothing_is_held, oracle_logprobs

LABELS = ["positive", "negative", "pos", "not at all sure"]
TEMPLATE = "Is this kind? " * 8 + "{{ text }}"


@pytest.fixture(scope="module")
def model(tiny_model_dir: TinyModelDir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    ends = {"eos_token_id": [0, 2]}
    small = {"max_num_batched_tokens": 48, "max_num_seqs": 16}  # so that prompts are computed in chunks
    with LLM(model, max_model_len=512, gpu_memory_utilization=0.2, override_generation_config=ends, **small) as loaded:
        yield loaded


def oracle(llm: LLM, model: str, prompt: str, label: str, ends: tuple[int, ...]) -> float:
    """The log-probability of ``label`` and any of ``ends`` behind a prompt of text, by mlx-lm."""
    before, behind = llm.tokenize(prompt, False), llm.tokenize(label, False)
    after = oracle_logprobs(model, [*before, *behind])[len(before) - 1 :]
    own = sum(float(after[place, token]) for place, token in enumerate(behind))
    return own + float(np.logaddexp.reduce([after[len(behind), end] for end in ends])) if ends else own


def assert_same(row: Any, labels: list[str], logs: list[float]) -> None:
    wanted = np.exp(np.array(logs) - np.logaddexp.reduce(logs))
    found = [row[f"p({label})"] for label in labels]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert math.log(row["coverage"]) == pytest.approx(np.logaddexp.reduce(logs), abs=2e-3)
    assert row["choice"] == labels[int(np.argmax(wanted))]


def test_probabilities_are_those_of_mlx_lms_logits_for_every_row_and_label(llm: LLM, model: str) -> None:
    rows = pandas.DataFrame({"text": ["A river.", "A stone in winter", "seven lamps"]}, index=["a", "b", "c"])
    found = llm.map(rows, TEMPLATE, choices=LABELS, system="Answer.", use_tqdm=False)
    assert list(found.columns) == [
        *("prompt", "system", "choice", *(f"p({label})" for label in LABELS)),
        *("coverage", "prompt_tokens", "cached_tokens", "time", "error"),
    ]
    assert list(found.index) == list(rows.index)
    ends = tuple(llm._requests.eos_token_ids)
    assert len(ends) == 2
    for _, row in found.iterrows():
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": row["prompt"]}]
        prompt = llm.render_chat(messages)
        assert row["prompt_tokens"] == len(llm.tokenize(prompt, False))
        assert_same(row, LABELS, [oracle(llm, model, prompt, label, ends) for label in LABELS])
    assert found.filter(like="p(").sum(axis=1).tolist() == pytest.approx([1, 1, 1])


def test_a_raw_prompt_goes_on_with_a_label_and_no_end_is_asked_for(llm: LLM, model: str) -> None:
    labels = [" Paris", " Lyon", " a big city"]
    (found,) = llm.map(["The capital is"], "{{ text }}", raw=True, choices=labels, use_tqdm=False).to_dict("records")
    assert_same(found, labels, [oracle(llm, model, "The capital is", label, ()) for label in labels])


def test_labels_may_be_numbers_and_a_single_one_is_certain_but_not_covered(llm: LLM) -> None:
    rated = llm.map(["a"], "{{ text }}", choices=range(1, 6), use_tqdm=False)
    assert rated["choice"].iloc[0] in range(1, 6)
    assert [name for name in rated.columns if name.startswith("p(")] == [f"p({n})" for n in range(1, 6)]
    single = llm.map(["a"], "{{ text }}", choices=np.array(["yes"]), use_tqdm=False).iloc[0]
    assert single["p(yes)"] == 1
    assert 0 < single["coverage"] < 1
    mixed = llm.map(["a"], "{{ text }}", choices=[np.int64(3), np.str_("z")], use_tqdm=False)
    assert mixed["choice"].iloc[0] in (3, "z")


def test_a_label_that_would_end_the_answer_is_refused(llm: LLM) -> None:
    end = llm.tokenizer.decode([2], skip_special_tokens=False)
    found = llm.map(["a"], "{{ text }}", choices=["yes", f"no{end}"], use_tqdm=False)
    assert "ends an answer: no answer reads so" in found.error[0]


def test_sixty_labels_compute_the_prompt_once(llm: LLM) -> None:
    llm.reset_prefix_cache()
    before = llm.stats()
    labels = [f"label {n}" for n in range(60)]
    found = llm.map(["a stone " * 40], "{{ text }}", choices=labels, use_tqdm=False).iloc[0]
    after = llm.stats()
    assert sum(found[f"p({label})"] for label in labels) == pytest.approx(1)
    asked, hit = after.prefix_queries - before.prefix_queries, after.prefix_hits - before.prefix_hits
    num_requests = len(labels) * 2
    assert asked > num_requests * found["prompt_tokens"]
    assert hit >= (num_requests - 1) * ((found["prompt_tokens"] - 1) // 16 * 16)
    assert_nothing_is_held(llm)


def test_a_row_that_fails_stays_alone_and_resume_goes_on_from_a_file(llm: LLM, tmp_path: Any) -> None:
    rows = pandas.DataFrame({"text": ["one", "long " * 600, "three", None]})
    first = llm.map(rows, "{{ text }}", choices=["yes", "no"], use_tqdm=False)
    assert "maximum context length is 512" in first.error[1]
    assert "'text' is undefined" in first.error[3]
    assert first.choice.isna().tolist() == [False, True, False, True]
    first.to_csv(tmp_path / "first.csv")
    asked = llm.stats().prefix_queries
    again = llm.map(
        rows.iloc[[0, 2]],
        "{{ text }}",
        choices=["yes", "no"],
        use_tqdm=False,
        resume=pandas.read_csv(tmp_path / "first.csv"),
    )
    assert llm.stats().prefix_queries == asked
    assert again["p(yes)"].tolist() == pytest.approx(first["p(yes)"][[0, 2]].tolist())
    with pytest.raises(RequestError, match=r"column 'p\(maybe\)' is missing"):
        llm.map(rows, "{{ text }}", choices=["yes", "maybe"], use_tqdm=False, resume=first)


@pytest.mark.parametrize(
    ("choices", "options", "said"),
    [
        ([], {}, "give at least one label"),
        ("yes", {}, r"give a list of labels"),
        (["yes", "yes"], {}, "'yes' is there twice"),
        ([1, "1"], {}, "'1' is there twice"),
        (["yes", " "], {}, "a text or a number"),
        ([None], {}, "a text or a number"),
        ([float("nan"), 1], {}, "a text or a number, not nan"),
        (["yes", "no"], {"temperature": 0}, "temperature: choices are scored, not sampled"),
        (["yes", "no"], {"max_tokens": [1, 2]}, "max_tokens: choices are scored"),
        (["yes", "no"], {"schema": True}, "leave one of the two out"),
        (["yes", "no"], {"colour": 1}, "Unknown sampling parameter 'colour'"),
        (["pos", "positive"], {"raw": True}, "'positive' begins with 'pos'"),
        (["yes", "no"], {"raw": True, "system": "x"}, "system: only for chats"),
    ],
)
def test_what_is_no_choice_is_refused_by_name(llm: LLM, choices: Any, options: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        llm.map(["a"], "{{ text }}", choices=choices, use_tqdm=False, **options)


def test_a_model_that_thinks_is_asked_without_a_thought_or_refused(scripted_llm: ScriptedLLM) -> None:
    messages = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template = messages + "<|im_start|>assistant\n"
    switch = "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    llm = scripted_llm("<think>\n\n</think>\n\nyes", chat_template=template + switch, reasoning_parser="qwen3")
    seen: list[str] = []
    prepare = llm.prepare

    def noted(request: Any) -> Any:
        seen.append((made := prepare(request)).prompt or "")
        return made

    llm.prepare = noted  # type: ignore[method-assign]
    found = llm.map(["a"], "{{ text }}", choices=["yes", "no"], use_tqdm=False)
    assert found.choice[0] == "yes"
    assert seen[0].endswith("</think>\n\n")
    with pytest.raises(RequestError, match="enable_thinking: choices are answers without a thought"):
        llm.map(["a"], "{{ text }}", choices=["yes"], chat_template_kwargs={"enable_thinking": True}, use_tqdm=False)
    always = scripted_llm("yes", chat_template=template, reasoning_parser="qwen3")
    with pytest.raises(RequestError, match="no switch for that"):
        always.map(["a"], "{{ text }}", choices=["yes"], use_tqdm=False)


def test_nothing_is_logged_for_explain_and_a_stopped_map_keeps_whole_rows(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("yes", step_seconds=0.05)
    remembered = len(llm.request_log)
    labels = ["yes", "no", "perhaps"]
    client = ChoiceClient(llm, read_choices(labels), frozenset(llm._requests.eos_token_ids))
    job = client.submit("Well?", {})
    over = threading.Event()
    job.abort()
    job.stream.when_over(over.set)
    assert over.wait(30)
    with pytest.raises(Exception, match="stopped before all choices were scored"):
        job.answer()
    assert len(llm.request_log) == remembered

    def rows() -> Iterator[str]:
        yield "one"
        raise KeyboardInterrupt

    with pytest.raises(MapInterrupted) as stopped:
        llm.map(rows(), "{{ text }}", choices=labels, use_tqdm=False)
    assert "error" in stopped.value.result.columns
    again = llm.map(["one"], "{{ text }}", choices=labels, use_tqdm=False, resume=llm.last_map)
    assert again.error.isna().all()
    assert_nothing_is_held(llm)


def test_a_request_that_cannot_be_queued_is_the_rows_error(llm: LLM) -> None:
    client = ChoiceClient(llm, ("yes", "no"), frozenset((0,)))
    requests = client.requests("Well?")

    def submit(request: Any) -> Any:
        if request is requests[1]:
            raise RequestError("the second is refused")
        return llm.submit(request)

    job = ChoiceJob(client.labels, requests, submit)
    over = threading.Event()
    job.start()
    job.when_over(over.set)
    assert over.wait(30)
    with pytest.raises(RequestError, match="the second is refused"):
        job.answer()


def test_a_row_without_numbers_is_asked_again() -> None:
    columns = ChoiceColumns(("yes", "no"))
    whole = {"choice": "yes", "p(yes)": 0.75, "p(no)": 0.25, "coverage": 0.5, "time": 1.5, "prompt_tokens": 7}
    answer = columns.read(whole)
    assert answer is not None
    assert (answer.text, answer.prompt_tokens, answer.time) == ("yes", 7, 1.5)
    assert columns.read({**whole, "p(no)": float("nan")}) is None
