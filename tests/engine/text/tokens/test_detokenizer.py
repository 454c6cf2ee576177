"""The detokenizer: characters split over tokens, stop strings split over deltas."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from engine.params.sampling_params import SamplingParams
from engine.text.tokens.detokenizer import Detokenizer, StopStrings
from engine.text.tokens.text_stream import TextStream
from engine.text.tokens.token_texts import token_texts


class ByteTokenizer:
    """One token per ASCII character, other characters byte by byte; 256 and 257 are special."""

    def __init__(self) -> None:
        vocab = {chr(b) if 32 <= b < 127 else f"<0x{b:02X}>": b for b in range(256)}
        self.hf = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
        self.hf.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        self.hf.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<tool>", special=True)])
        self.special_ids = frozenset({256, 257})

    def token_text(self, token_id: int) -> str:
        return self.hf.decode([token_id], skip_special_tokens=False)


class WordTokenizer(ByteTokenizer):
    """Sentencepiece-like: a decoder that strips the first space."""

    def __init__(self) -> None:
        words = ["<unk>", "▁Hello", "▁world", "▁again", "!"]
        self.hf = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
        self.hf.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
        )
        self.special_ids = frozenset()


class SpacedTokenizer(ByteTokenizer):
    """No decoder: tokens are joined with spaces."""

    def __init__(self) -> None:
        self.hf = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        self.hf.add_special_tokens([AddedToken("<x>", special=True), AddedToken("<y>", special=True)])
        self.special_ids = frozenset({2, 3})


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def params(**given: object) -> SamplingParams:
    return SamplingParams(**given)  # type: ignore[arg-type]


def chunkings(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way of cutting ``items`` into runs."""
    for cuts in itertools.product((False, True), repeat=len(items) - 1):
        chunks: list[list[int]] = [[items[0]]]
        for item, cut in zip(items[1:], cuts, strict=True):
            if cut:
                chunks.append([])
            chunks[-1].append(item)
        yield chunks


def run(chunks: Iterable[Sequence[int]], given: SamplingParams) -> tuple[str, str | None, int]:
    """Text, stop reason and number of tokens used."""
    detokenizer = Detokenizer(ByteTokenizer(), ids_of("prompt"), given)
    chunks = list(chunks)
    text, used = "", 0
    for position, chunk in enumerate(chunks):
        step = detokenizer.step(chunk, finished=position == len(chunks) - 1)
        text += step.text_delta
        used += step.num_tokens_kept
        if step.stop_reason is not None:
            break
    assert text == detokenizer.text
    return text, step.stop_reason, used


def test_a_character_split_over_tokens_is_shown_whole() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), ids_of("p"), params())
    deltas = [detokenizer.step([token]).text_delta for token in ids_of("é€😀")]
    assert deltas == ["", "é", "", "", "€", "", "", "", "😀"]


def test_bytes_left_over_at_the_end_come_as_replacement_characters() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), ids_of("p"), params())
    assert detokenizer.step(ids_of("a")).text_delta == "a"
    assert detokenizer.step(ids_of("😀")[:3]).text_delta == ""
    last = detokenizer.step([], finished=True).text_delta
    assert last
    assert set(last) == {"\ufffd"}


def test_invalid_bytes_after_a_character_do_not_end_the_stream() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), ids_of("p"), params())
    text = "".join(detokenizer.step([token]).text_delta for token in [*ids_of("aé"), 0xFF, *ids_of("bcé")])
    assert text.startswith("aé")
    assert text.endswith("bcé")
    assert "\ufffd" in text


def test_the_first_word_keeps_the_space_that_joins_it_to_the_prompt() -> None:
    detokenizer = Detokenizer(WordTokenizer(), [1], params())
    assert detokenizer.step([2, 3, 4]).text_delta == " world again!"
    assert Detokenizer(WordTokenizer(), [], params()).step([2, 3]).text_delta == "world again"


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    tokens = [*ids_of("a"), 257, *ids_of("b")]
    assert run([tokens], params())[0] == "ab"
    assert run([tokens], params(skip_special_tokens=False))[0] == "a<tool>b"


def test_special_tokens_stand_together_without_the_decoders_spaces_when_asked() -> None:
    tokens = [0, 2, 3, 1]
    shown = {
        spaces: Detokenizer(
            SpacedTokenizer(), [], params(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        )
        .step(tokens, finished=True)
        .text_delta
        for spaces in (True, False)
    }
    assert shown == {True: "a <x> <y> b", False: "a <x><y> b"}


@pytest.mark.parametrize(
    ("text", "stop", "shown", "met", "used"),
    [
        ("one STOP two", ["STOP"], "one ", "STOP", 8),
        ("one STO two", ["STOP"], "one STO two", None, 11),
        ("aaab", ["aab"], "a", "aab", 4),
        ("xabcd", ["abcd", "bc"], "xa", "bc", 4),
        ("xabc", ["bc", "abc"], "x", "abc", 4),
        ("ST€P", ["€"], "ST", "€", 5),
        ("end STO", ["STOP"], "end STO", None, 7),
        ("STOP", ["STOP"], "", "STOP", 4),
    ],
)
def test_a_stop_string_is_cut_the_same_at_every_chunking(
    text: str, stop: list[str], shown: str, met: str | None, used: int
) -> None:
    for chunks in chunkings(ids_of(text)):
        assert run(chunks, params(stop=stop)) == (shown, met, used), chunks


def test_a_stop_string_split_over_two_deltas_is_never_shown() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), [], params(stop=["</s>"]))
    assert detokenizer.step(ids_of("hi</")).text_delta == "hi"
    step = detokenizer.step(ids_of("s>more"))
    assert (step.text_delta, step.stop_reason, step.num_tokens_kept) == ("", "</s>", 2)


def test_held_back_text_is_released_when_it_cannot_match_any_more() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), [], params(stop=["</s>"]))
    assert detokenizer.step(ids_of("a</")).text_delta == "a"
    assert detokenizer.step(ids_of("b")).text_delta == "</b"


def test_include_stop_str_in_output_shows_the_stop_string_and_nothing_after() -> None:
    for chunks in chunkings(ids_of("a END b")):
        shown, met, _ = run(chunks, params(stop=["END"], include_stop_str_in_output=True))
        assert (shown, met) == ("a END", "END")


def test_min_tokens_lets_early_stop_strings_pass_at_every_chunking() -> None:
    for chunks in chunkings(ids_of("a|b|c|d")):
        assert run(chunks, params(stop=["|"], min_tokens=2, max_tokens=9)) == ("a|b", "|", 4)
    for chunks in chunkings(ids_of("xabab")):
        assert run(chunks, params(stop=["ab"], min_tokens=2, max_tokens=9)) == ("x", "ab", 3)


def test_the_stop_tokens_own_text_is_not_shown_unless_included() -> None:
    shown = {}
    for include in (False, True):
        given = params(skip_special_tokens=False, include_stop_str_in_output=include, stop=["<end>"])
        step = Detokenizer(ByteTokenizer(), [], given).step([*ids_of("a"), 256], finished=True, ends_on_stop_token=True)
        assert (step.stop_reason, step.num_tokens_kept) == (None, 2)
        shown[include] = step.text_delta
    assert shown == {False: "a", True: "a<end>"}


def test_detokenize_off_gives_no_text() -> None:
    step = Detokenizer(ByteTokenizer(), [], params(detokenize=False)).step(ids_of("abc"), finished=True)
    assert (step.text_delta, step.num_tokens_kept) == ("", 3)


def test_a_prompt_that_ends_inside_a_character_is_not_repeated_in_the_output() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), ids_of("prompt😀")[:-1], params())
    assert detokenizer.step(ids_of("ok"), finished=True).text_delta == "ok"


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["abc", "b1234567"])
    assert stops.feed("xxab") == ("xx", None)
    assert stops.feed("1") == ("a", None)
    assert stops.feed("!") == ("b1!", None)
    assert stops.flush() == ""


def test_a_stream_goes_on_behind_bytes_that_stop_being_a_character() -> None:
    """Token streams without a prompt, such as those that look for the end of a thought, meet any bytes too."""
    for text in itertools.product((*"😀".encode(), *"é".encode(), *b"a"), repeat=4):
        stream = TextStream(ByteTokenizer(), skip_special_tokens=False)
        shown = "".join([*map(stream.step, text), stream.step(ord("b")), stream.flush()])
        assert shown.endswith("b")


def test_the_texts_of_tokens_keep_the_spaces_between_words() -> None:
    hf = WordTokenizer().hf
    assert token_texts([1, 2, 3, 4], hf.decode) == ["Hello", " world", " again", "!"]


def test_the_texts_of_tokens_make_up_the_whole_text_whatever_the_bytes() -> None:
    hf = ByteTokenizer().hf
    for text in ("naïve 😀!", "", "\n漢字\n"):
        assert "".join(token_texts(ids_of(text), hf.decode)) == text
    texts = token_texts([0xF0, 0x9F, *b"ab", *[0xF0] * 20, *b"c"], hf.decode)
    assert "".join(texts).replace("\ufffd", "") == "abc"
    assert len(texts) == 25
