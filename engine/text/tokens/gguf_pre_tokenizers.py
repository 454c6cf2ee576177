"""How the byte-pair vocabularies of GGUF files split a text before they merge: ``tokenizer.ggml.pre`` by name.

The patterns are those of the models' own tokenizer files, which llama.cpp's C++ only approaches for some scripts.
"""

from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to split: ``patterns`` one after another, each match a piece of its own.

    ``gpt2_split`` adds GPT-2's own split, after each digit was set apart where ``digits`` says so. ``ignore_merges``
    takes whole words of the vocabulary as they are; ``begins``: BOS goes first unless the file denies it; ``nfc``:
    texts are composed first. Without ``byte_level`` the pieces stay UTF-8, and spaces become U+2581.
    """

    patterns: tuple[str, ...] = ()
    gpt2_split: bool = False
    digits: bool = False
    ignore_merges: bool = False
    begins: bool = False
    nfc: bool = False
    byte_level: bool = True

    def build(self) -> Any:
        """The split as a ``tokenizers`` object, None where there is nothing to split."""
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        if self.byte_level:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2_split))
        return pre_tokenizers.Sequence(steps) if steps else None


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_QWEN2 = _CONTRACTIONS + "|" + _WORD + r"|\p{N}" + _TAIL
_LLAMA3 = _CONTRACTIONS + "|" + _WORD + r"|\p{N}{1,3}" + _TAIL
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_JAIS2 = (
    _LLAMA3.removesuffix(r"|\s+(?!\S)|\s+")
    + "".join(rf"|\s{{{width}}}(?!\S)" for width in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)


def _cased(ending: str = "", but: str = "") -> str:
    """Words that change from capitals to small letters at most once, without the characters ``but``."""
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}"


_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_TEKKEN = _cased() + r"|\p{N}" + _CASED_TAIL
_GPT4O = _cased(_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_TAIL
_YOUTU = _cased(_CONTRACTIONS + "?") + r"|\p{N}" + _CASED_TAIL
_KIMI = r"\p{Han}+|" + _cased(_CONTRACTIONS + "?", r"&&[^\p{Han}]") + r"|\p{N}{1,3}" + _TAIL
_ASCII_MARK = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_MARKED = _ASCII_MARK + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_CHINESE_KANA = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CHINESE_KOREAN = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3 = (r"\p{N}{1,3}", _CHINESE_KANA, _MARKED + r"[\r\n]*" + _SPACES)
_CASED_SCRIPTS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 "
    "3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 "
    "1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe "
    "1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 "
    "2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 "
    "a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a "
    "10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
"""Letters that have cases, as DeepSeek's first tokenizer lists them: code points in hexadecimal, first and last."""
_CASED_LETTERS = "".join(
    "-".join(rf"\x{{{point}}}" for point in letters.split("-")) for letters in _CASED_SCRIPTS.split()
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _CHINESE_KOREAN,
)
_ASIAN = "".join(
    rf"{first}-{last}"
    for first, last in (
        *((r"\u4e00", r"\u9fff"), (r"\u3400", r"\u4dbf"), (r"\uf900", r"\ufaff"), (r"\u3040", r"\u309f")),
        *((r"\u30a0", r"\u30ff"), (r"\uff65", r"\uff9f"), (r"\u2f00", r"\u2fdf"), (r"\u0e00", r"\u0e7f")),
        *((r"\u0e80", r"\u0eff"), (r"\u1780", r"\u17ff"), (r"\u1000", r"\u109f"), (r"\uaa60", r"\uaa7f")),
        *((r"\ua9e0", r"\ua9ff"), (r"\uac00", r"\ud7af"), (r"\u1100", r"\u11ff")),
    )
)
_THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_DIGITS_OF_THREE = r"[0-9][0-9][0-9]"
_NO_STOPS = r" ?[^(\s|.,!?…。，、।۔،)]+"

_FALCON = PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _DIGITS_OF_THREE))
_PLAIN = PreTokenizer(gpt2_split=True)
_EACH_DIGIT = PreTokenizer(gpt2_split=True, digits=True)
_OF_LLAMA3 = PreTokenizer((_LLAMA3,))
_WHOLE_WORDS = PreTokenizer((_LLAMA3,), ignore_merges=True, begins=True)
_OF_QWEN2 = PreTokenizer((_QWEN2,))
_OF_GPT4O = PreTokenizer((_GPT4O,))
_OF_DEEPSEEK_V3 = PreTokenizer(_DEEPSEEK_V3)
_BLOOM = PreTokenizer((_NO_STOPS,))
_BAILING = PreTokenizer(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)
_WHOLE_TEXT = PreTokenizer(byte_level=False)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _DIGITS_OF_THREE)),
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "gigachat", "a.x-4.0", "mellum"), _PLAIN),
    **dict.fromkeys(("exaone4", "trillion", "granite-docling"), _PLAIN),
    **dict.fromkeys(("mpt", "olmo"), replace(_PLAIN, nfc=True)),
    **dict.fromkeys(("smollm", "refact", "starcoder", "codeshell", "exaone", "minerva-7b", "mellum2"), _EACH_DIGIT),
    "command-r": replace(_EACH_DIGIT, nfc=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2"), replace(_OF_QWEN2, nfc=True)),
    **dict.fromkeys(("stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"), _OF_QWEN2),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), _WHOLE_WORDS),
    **dict.fromkeys(("midm-2.0", "lfm2"), _WHOLE_WORDS),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), _OF_LLAMA3),
    **dict.fromkeys(("glm4", "glm5"), replace(_OF_LLAMA3, ignore_merges=True)),
    "jais-2": PreTokenizer((_JAIS2,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _OF_GPT4O),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _OF_DEEPSEEK_V3),
    "deepseek-llm": PreTokenizer((*_DEEPSEEK_LLM, r"\p{N}")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, r"\p{N}")),
    "spark2_5": PreTokenizer(
        (r"\p{N}{1,3}", _CHINESE_KANA, _MARKED + r"|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    ),
    "youtu": PreTokenizer(
        (
            r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            _YOUTU,
        ),
        ignore_merges=True,
    ),
    "falcon": _FALCON,
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _BLOOM),
    "viking": PreTokenizer((_NO_STOPS, r"\p{N}")),
    "exaone-moe": PreTokenizer(
        (
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
            + r"|\s+(?!\S)|\s+",
        )
    ),
    "chameleon": PreTokenizer(
        (
            *(r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )"),
            *(r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        ),
        begins=True,
    ),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    "seed-coder": PreTokenizer((_CONTRACTIONS + "|" + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES,)),
    "ufakzeka": PreTokenizer((_WORD + r"|\p{N}" + _TAIL,)),
    "afmoe": PreTokenizer((_THREES, rf"[{_ASIAN}]+", _MARKED + r"[\r\n]*" + _SPACES)),
    "laguna": PreTokenizer((r"[^\n]+|\n+", _QWEN2)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _CONTRACTIONS + "|" + _WORD + r"|\p{N}+" + _TAIL), ignore_merges=True),
    **dict.fromkeys(("gemma4", "sarvam-moe"), _WHOLE_TEXT),
}
"""By the names that llama.cpp's converter writes; those of embedding models alone are left out."""
