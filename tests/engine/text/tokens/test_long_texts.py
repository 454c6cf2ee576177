"""Long texts: refused untokenized where they can never fit, tokenized beside other threads, and interruptible."""

import random
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engine import ContextLengthError, GenerationError, RequestError, SamplingParams
from engine.batch.score import score_text
from engine.chat.request import ChatPreparer, ChatRequest, PromptRequest, Truncation
from engine.params.settings import Settings
from engine.text.template.chat_template import ChatTemplate
from engine.text.tokens.long_texts import byte_alphabet, longest_token
from engine.text.tokens.tokenizer import Tokenizer as OurTokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "def f(x):\n    return  x", "naïve café Ω 漢字"] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(**parts):
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    hf.train_from_iterator([*CORPUS, " " * 64], trainer)
    hf.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(hf, name, part)
    return hf


def plain(**parts):
    """Byte pairs over characters, with what ``parts`` say of unknown ones."""
    words = {"a": 0, "b": 1, "ab": 2, "\u2581": 3, "<unk>": 4, " ": 5}
    options = {name: parts.pop(name) for name in ("unk_token", "fuse_unk", "byte_fallback") if name in parts}
    vocab = words | ({byte: i + 6 for i, byte in enumerate(BYTES)} if options.get("byte_fallback") else {})
    hf = Tokenizer(models.BPE(vocab, [("a", "b")], **options))
    for name, part in parts.items():
        setattr(hf, name, part)
    return hf


def with_tokens(hf, *tokens):
    hf.add_special_tokens(list(tokens))
    return hf


def without_bytes(*missing):
    """A vocabulary that lacks bytes, as SmolLM2's, and drops them from a text."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [char for char in sorted(bytes_only.alphabet()) if byte_alphabet()[char] not in missing]
    hf = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    hf.pre_tokenizer = bytes_only
    return hf


def split(pattern, behaviour):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behaviour), level])


space, fallback = normalizers.Replace(" ", "\u2581"), {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
BOUNDED = {
    "byte-level": byte_level,
    "byte-level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level, NFKC and lower case": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "byte-level, stripped": lambda: byte_level(normalizer=normalizers.Strip()),
    "byte-level, a token that takes the space": lambda: with_tokens(
        byte_level(), AddedToken("<t>", lstrip=True, rstrip=True)
    ),
    "byte-level, a long token": lambda: with_tokens(byte_level(), AddedToken("<" + "x" * 200 + ">")),
    "byte-level, a few bytes missing": lambda: without_bytes(0x00, 0x61, 0xF0, 0xF1),
    "byte-level, split by words": lambda: byte_level(pre_tokenizer=split(r"\w+", "isolated")),
    "byte fallback": lambda: plain(normalizer=space, **fallback),
    "byte fallback, prepended": lambda: plain(
        normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), space]), **fallback
    ),
    "byte fallback, two make one": lambda: plain(normalizer=normalizers.Replace("ab", "b"), **fallback),
    "one unknown for each": lambda: plain(unk_token="<unk>"),
    "white space apart": lambda: plain(unk_token="<unk>", pre_tokenizer=pre_tokenizers.Whitespace()),
}
UNBOUNDED = {
    "unknown characters are dropped": plain,
    "unknown characters are one": lambda: plain(unk_token="<unk>", fuse_unk=True),
    "spaces become one by a pattern": lambda: byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "deleted": lambda: byte_level(normalizer=normalizers.Replace("a", "")),
    "accents are taken off": lambda: byte_level(normalizer=normalizers.StripAccents()),
    "what splits is dropped": lambda: byte_level(pre_tokenizer=split("-+", "removed")),
    "whole words": lambda: Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
    "what characters end with is missing": lambda: without_bytes(0x80),
    "nearly all bytes are missing": lambda: Tokenizer(models.BPE({"a": 0}, [])),
}
PIECES = [
    *("a", "b", "ab", " ", "   ", "\n", "\u2003", "the quick brown fox", " " * 70, "<t>", "  <t>  "),
    *("é", "e\u0301", "漢", "🙂", "\u1100\u1161\u11a8", "\u03b1\u0313\u0300\u0345", "Ω", "ﬃ", "\x00", "İ"),
    "<" + "x" * 200 + ">",
]


@pytest.mark.parametrize("make", BOUNDED.values(), ids=BOUNDED)
def test_no_text_has_fewer_tokens_than_the_bound_says(make):
    hf, dice = make(), random.Random(5)
    longest = longest_token(hf)
    assert longest is not None
    for _ in range(300):
        text = "".join(dice.choices(dice.choices(PIECES, k=2), k=dice.randrange(40)))
        assert longest.fewest_tokens(text) <= len(hf.encode(text, add_special_tokens=False).ids), text


@pytest.mark.parametrize("make", UNBOUNDED.values(), ids=UNBOUNDED)
def test_where_a_token_may_stand_for_any_text_nothing_is_refused_untokenized(make):
    assert longest_token(make()) is None
    OurTokenizer(make()).check_text("a" * 100_000, None, 2)


def test_a_part_written_in_python_is_not_looked_into():
    hf = byte_level()
    hf.normalizer = normalizers.Normalizer.custom(SimpleNamespace(normalize=lambda text: text.replace("a", "")))
    assert longest_token(hf) is None


@pytest.mark.parametrize("make", [*BOUNDED.values(), *UNBOUNDED.values()][:14], ids=[*BOUNDED, *UNBOUNDED][:14])
def test_long_texts_have_the_ids_of_the_librarys_usual_call(make):
    hf, dice = make(), random.Random(6)
    text = "".join(dice.choices(PIECES, k=2000))
    tokenizer = OurTokenizer(hf)
    assert len(text) > 5000
    for special in (True, False):
        assert tokenizer.encode(text, special) == hf.encode(text, add_special_tokens=special).ids
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids * 3) == hf.decode(ids * 3)


@pytest.fixture
def untokenized(monkeypatch):
    """A model's ways in, whose tokenizer must not be asked for the tokens of anything long."""
    tokenizer = OurTokenizer(byte_level())
    parsers = SimpleNamespace(tool_call_parser=None, make=lambda **_: None)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    preparer = ChatPreparer(tokenizer, template, parsers, Settings())
    tokenizer.check_text("x" * 99, None, 98)  # now it knows its longest token
    monkeypatch.setattr(tokenizer, "encode", lambda *_: pytest.fail("it was tokenized"))
    return preparer, tokenizer


TOO_LONG, LIMIT = "a b c " * 10_000, 64


def test_every_way_in_refuses_what_can_never_fit_before_it_is_tokenized(untokenized):
    preparer, tokenizer = untokenized
    params = SamplingParams(max_tokens=7)
    requests = [
        PromptRequest(prompt=TOO_LONG, sampling=params),
        ChatRequest(messages=[{"role": "user", "content": TOO_LONG}], sampling=params),
    ]
    for request in requests:
        with pytest.raises(
            ContextLengthError, match=r"maximum context length is 64 tokens.*requested 7 output"
        ) as caught:
            preparer.prepare(request, LIMIT)
        assert (caught.value.param, caught.value.limit) == ("prompt", LIMIT)
        assert LIMIT <= caught.value.num_prompt <= len(byte_level().encode(TOO_LONG).ids)
    with pytest.raises(ContextLengthError, match="maximum context length is 64 tokens"):
        score_text(None, tokenizer, TOO_LONG, 1, LIMIT)


def test_what_is_to_be_cut_may_be_of_any_length():
    tokenizer = OurTokenizer(byte_level())
    preparer = ChatPreparer(tokenizer, ChatTemplate("x"), SimpleNamespace(), Settings())
    request = PromptRequest(prompt=TOO_LONG, sampling=SamplingParams(), truncation=Truncation(5))
    assert preparer.prepare(request, LIMIT).token_ids == tokenizer.encode(TOO_LONG)[-5:]


def test_other_threads_run_while_a_long_text_is_tokenized():
    tokenizer, text = OurTokenizer(byte_level()), "the quick brown fox, naïve " * 60_000
    ticks, over = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not over.wait(0.002):
            ticks += 1

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        tokenizer.encode(text)
        seen = ticks
    finally:
        over.set()
        ticking.join()
    assert seen > 20


INTERRUPTED = """
import os, signal, sys, threading
from tests.engine.text.tokens.test_long_texts import byte_level
from engine.text.tokens.tokenizer import Tokenizer
tokenizer, text = Tokenizer(byte_level()), "the quick brown fox, naive " * 600_000
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt():
    while not any(thread.name == "tokenize" for thread in threading.enumerate()):
        pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    tokenizer.encode(text)
except KeyboardInterrupt:
    assert any(thread.name == "tokenize" for thread in threading.enumerate()), "it waited for the end"
    print("heard", flush=True)
    os._exit(0)
"""


def test_an_interrupt_is_heard_while_a_long_text_is_tokenized():
    run = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "heard\n", run.stderr


def test_the_librarys_panics_are_errors_of_ours():
    with pytest.raises(RequestError, match=r"cannot read this text .PanicException: .*--tokenizer"):
        OurTokenizer(byte_level(pre_tokenizer=pre_tokenizers.FixedLength(0))).encode("abc")
    with pytest.raises(RequestError, match=r"cannot read this text .PanicException: .*--tokenizer"):
        OurTokenizer(byte_level(pre_tokenizer=pre_tokenizers.FixedLength(0))).encode("abc" * 100_000)
    failing = OurTokenizer(byte_level(decoder=decoders.Strip("t", 1, 1)))
    token = failing.hf.token_to_id("t")
    with pytest.raises(GenerationError, match=r"cannot decode .* .PanicException: .*--tokenizer"):
        failing.decode([token])
    with pytest.raises(GenerationError, match="cannot decode"):
        failing.decode([token] * 5000)
    assert failing.token_text(token) == "\ufffd"
    stream = failing.decode_stream()
    with pytest.raises(GenerationError, match="cannot decode"):
        stream.step(token)


def test_the_librarys_other_errors_are_too():
    with pytest.raises(RequestError, match=r"cannot read this text .Exception: "):
        OurTokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))).encode("b")
