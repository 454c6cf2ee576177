"""Log-probabilities name tokens: names add up to the text, bytes to its UTF-8, and the likelier has a shared name."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as HFTokenizer

from engine.openai.server import start_server
from engine.outputs import Logprob, LogprobsAtPosition
from engine.text.tokens.tokenizer import Tokenizer
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, http_client
from tests.engine.openai.fakes import FakeLLM, byte_tokenizer

TEXT = "It is 世界, 😀 naïve"


def llama_tokenizer() -> Tokenizer:
    """As Llama's: words begin with ▁, what is not in the vocabulary is bytes, decoding strips the first space."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyzI,", "▁the", "the", "▁is"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(words)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "s"), ("▁", "is")]
    vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(("th", "is"))}
    hf = HFTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(hf, named_tokens={"bos_token": "<s>", "eos_token": "</s>"})


class ListedLLM(FakeLLM):
    """Each token has -1.5, and beside it stand the tokens of ``beside`` with the values there."""

    beside: dict[int, float]

    def logprobs(self, tokens: Sequence[int], num_top: int) -> list[LogprobsAtPosition]:
        text = self.tokenizer.token_text
        others = list(self.beside.items())[:num_top]
        return [
            {token: Logprob(-1.5, 2, text(token))}
            | {i: Logprob(value, 1, text(i)) for i, value in others if i != token}
            for token in tokens
        ]


@pytest.fixture(params=[byte_tokenizer, llama_tokenizer])
def llm(request: pytest.FixtureRequest) -> FakeLLM:
    made = ListedLLM(TEXT)
    made.tokenizer = request.param()
    made.beside = {}
    return made


@pytest.fixture
def http(llm: FakeLLM) -> Iterator[httpx.Client]:
    handle = start_server(llm, api_key=KEY)
    with http_client(handle) as client:
        yield client
    handle.stop()


def completion(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"prompt": "the é", "max_tokens": 50, "logprobs": 1, **body})
    assert response.status_code == 200, response.text
    choice = strict.completion(response.json())["choices"][0]
    assert isinstance(choice, dict)
    return choice


def streamed(http: httpx.Client, **body: Any) -> dict[str, list[Any]]:
    sent = {"prompt": "the é", "max_tokens": 50, "logprobs": 1, "stream": True, **body}
    joined: dict[str, list[Any]] = {}
    for chunk in strict.events(http.post("/v1/completions", json=sent).text)[0]:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined.setdefault(name, []).extend(values)
    return joined


def chat(http: httpx.Client, **body: Any) -> dict[str, Any]:
    sent = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 50, "logprobs": True, **body}
    response = http.post("/v1/chat/completions", json=sent)
    assert response.status_code == 200, response.text
    choice = strict.chat(response.json())["choices"][0]
    assert isinstance(choice, dict)
    return choice


def test_names_add_up_to_the_text_and_offsets_stand_in_it(http: httpx.Client) -> None:
    choice = completion(http)
    logprobs = choice["logprobs"]
    assert choice["text"] == "".join(logprobs["tokens"])
    assert choice["text"].lstrip() == TEXT
    ends = [*logprobs["text_offset"][1:], len(choice["text"])]
    pieces = [choice["text"][begin:end] for begin, end in zip(logprobs["text_offset"], ends, strict=True)]
    assert pieces == logprobs["tokens"]
    assert "世" in pieces
    assert streamed(http) == logprobs


def test_an_echoed_prompts_offsets_stand_in_the_text_whatever_encoding_added(http: httpx.Client, llm: FakeLLM) -> None:
    for prompt in ("the é", llm.tokenizer.encode("the é"), llm.tokenizer.encode("the é", False)[:-1]):
        choice = completion(http, prompt=prompt, echo=True)
        logprobs, text = choice["logprobs"], choice["text"]
        assert text[logprobs["text_offset"][-1] :] == logprobs["tokens"][-1] == "e"
        special = llm.tokenizer.special_tokens
        shown = [name for name in logprobs["tokens"] if name not in special or text.startswith(name)]
        assert "".join(shown).lstrip() == text.lstrip()
        place = logprobs["tokens"].index("é") if "é" in logprobs["tokens"] else None
        assert place is None or text[logprobs["text_offset"][place]] == "é"
        assert streamed(http, prompt=prompt, echo=True) == logprobs


def test_each_token_of_a_chat_has_its_own_bytes(http: httpx.Client) -> None:
    choice = chat(http)
    entries = choice["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == choice["message"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    assert [len(entry["bytes"]) for entry in entries[-6:]] == [1] * 6  # n, a, two of ï, v, e


def test_a_character_that_stays_cut_shows_as_the_text_does(http: httpx.Client, llm: FakeLLM) -> None:
    ids = llm.tokenizer.encode(TEXT, False)
    texts = completion(http)["logprobs"]["tokens"]
    cut = texts.index("世")
    choice = completion(http, max_tokens=cut)
    assert choice["text"].endswith("\ufffd")
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert streamed(http, max_tokens=cut) == choice["logprobs"]
    entries = chat(http, max_tokens=cut)["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"][-1:])[-2:] == "世".encode()[:2]
    assert len(entries) == cut < len(ids)


@pytest.mark.parametrize("llm", [llama_tokenizer], indirect=True)
def test_a_space_before_a_word_is_in_its_name(http: httpx.Client, llm: FakeLLM) -> None:
    words = [llm.tokenizer.hf.token_to_id(text) for text in ("the", "▁the")]
    assert isinstance(llm, ListedLLM)
    llm.beside = dict(zip(words, (-0.5, -1.0), strict=True))
    top = completion(http, logprobs=2)["logprobs"]["top_logprobs"][-1]
    assert top == {"the": -0.5, " the": -1.0, "e": -1.5}
    listed = chat(http, top_logprobs=2)["logprobs"]["content"][-1]["top_logprobs"]
    assert [(one["token"], bytes(one["bytes"])) for one in listed] == [("the", b"the"), (" the", b" the")]


def test_tokens_that_share_a_name_give_it_the_likeliers_value(http: httpx.Client, llm: FakeLLM) -> None:
    """``is_greedy`` of evaluation programs compares a token's value with the largest at its place."""
    pieces = [i for i in range(llm.tokenizer.vocab_size) if llm.tokenizer.token_text(i) == "\ufffd"][:2]
    assert isinstance(llm, ListedLLM)
    llm.beside = dict(zip(pieces, (-0.25, -1.0), strict=True))
    assert completion(http, logprobs=2)["logprobs"]["top_logprobs"][-1] == {"\ufffd": -0.25, "e": -1.5}
    alternatives = chat(http, top_logprobs=2)["logprobs"]["content"][-1]["top_logprobs"]
    assert [bytes(one["bytes"]) for one in alternatives] == list(map(llm.tokenizer.token_bytes, pieces))
    assert len(set(map(llm.tokenizer.token_bytes, pieces))) == 2


def test_names_by_id_are_never_shared(http: httpx.Client, llm: FakeLLM) -> None:
    assert isinstance(llm, ListedLLM)
    pieces = [i for i in range(llm.tokenizer.vocab_size) if llm.tokenizer.token_text(i) == "\ufffd"][:2]
    llm.beside = dict(zip(pieces, (-0.25, -1.0), strict=True))
    choice = completion(http, logprobs=2, return_tokens_as_token_ids=True)
    assert len(choice["logprobs"]["top_logprobs"][-1]) == 3
    assert choice["logprobs"]["text_offset"][-1] == len(choice["text"]) - 1
    assert json.dumps(choice["logprobs"]["tokens"][-1]).startswith('"token_id:')
