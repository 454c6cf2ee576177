"""Models, tokens, health, version, metrics and documentation."""

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.openai import strict
from tests.engine.openai.fakes import FakeLLM


def test_models_are_vllms_cards_under_each_name(http: httpx.Client, client: openai.OpenAI) -> None:
    cards = http.get("/v1/models").json()
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == ["fake", "org/fake-model"]
    card = strict.model(cards["data"][0])
    assert (card["owned_by"], card["root"], card["max_model_len"]) == ("vllm", "org/fake-model", 512)
    assert card["permission"][0]["object"] == "model_permission"
    assert http.get("/v1/models/org/fake-model").json()["id"] == "org/fake-model"
    assert client.models.retrieve("fake").id == "fake"
    strict.error(http.get("/v1/models/other"), 404, "NotFoundError", "model")


def test_a_prompt_is_tokenized(http: httpx.Client, llm: FakeLLM) -> None:
    reply = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert reply["tokens"] == llm.tokenizer.encode("hé")
    assert (reply["count"], reply["max_model_len"]) == (4, 512)
    assert reply["token_strs"] == ["<|start|>", "h", "Ã", "©"]
    reply = http.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False}).json()
    assert (reply["count"], reply["token_strs"]) == (3, None)


def test_a_chat_is_tokenized_as_the_chat_route_does(http: httpx.Client, llm: FakeLLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    http.post("/v1/chat/completions", json={"messages": messages})
    assert tokens == llm.submitted[-1].prompt_token_ids
    shorter = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert shorter["count"] < len(tokens)


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}])
def test_tokenize_wants_one_of_its_two_forms(http: httpx.Client, body: dict[str, object]) -> None:
    strict.error(http.post("/tokenize", json=body), 400, "BadRequestError", "prompt")


def test_tokens_are_detokenized_with_special_ones(http: httpx.Client, llm: FakeLLM) -> None:
    assert http.post("/detokenize", json={"tokens": llm.tokenizer.encode("hé")}).json() == {"prompt": "<|start|>hé"}
    strict.error(http.post("/detokenize", json={"tokens": [99999]}), 400, "BadRequestError", "tokens")
    strict.error(http.post("/detokenize", json={"tokens": [2**40]}), 400, "BadRequestError", "tokens")
    strict.error(http.post("/detokenize", json={"tokens": ["a"]}), 400, "BadRequestError", "tokens")
    strict.error(http.post("/detokenize", json={}), 400, "BadRequestError", "tokens")


def test_health_and_ping_follow_the_engine(http: httpx.Client, llm: FakeLLM) -> None:
    for closed, status in ((False, 200), (True, 503)):
        llm.closed = closed
        assert [http.get("/health").status_code, http.get("/ping").status_code] == [status, status]
        assert http.post("/ping").status_code == status


def test_the_version_is_told(http: httpx.Client) -> None:
    assert set(http.get("/version").json()) == {"version"}


def test_metrics_hold_the_engines_and_the_ports(http: httpx.Client, llm: FakeLLM) -> None:
    http.get("/version")
    http.get("/v1/nowhere")
    llm.metrics.observe_preemptions(1)
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, sample.labels.get("handler"), sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["vllm:num_preemptions_total", None, None] == 1
    assert samples["http_requests_total", "/version", "2xx"] == 1
    assert samples["http_requests_total", "none", "4xx"] == 1


def test_the_api_documents_itself(http: httpx.Client) -> None:
    assert http.get("/docs").status_code == 200
    schema = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/metrics"} <= set(schema["paths"])
    fields = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "top_k", "chat_template_kwargs"} <= set(fields)
