"""What a folder's tokenizer class changes about its ``tokenizer.json``, as transformers 5 has it.

Some classes build a tokenizer of their own from the file's vocabulary and merges, and the file's normalizer,
pre-tokenizer, decoder and flags are lost; the others keep the file. The ids are those that a model's users have, so
the same is done here, without transformers, which takes a second to import. The tests compare every table with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.text.tokens.gguf_pre_tokenizers import PRE_TOKENIZERS

FILE_CLASS = "TokenizersBackend"
"""The class that keeps ``tokenizer.json`` as it is."""

_SPACE = "\u2581"
_GPT2_TOKENS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_QWEN_TOKENS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

CLASS_TOKENS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "CodeLlamaTokenizer": _LLAMA_TOKENS
        | {
            "prefix_token": "\u2581<PRE>",
            "middle_token": "\u2581<MID>",
            "suffix_token": "\u2581<SUF>",
            "eot_token": "\u2581<EOT>",
            "fill_token": "<FILL_ME>",
        },
        "CohereTokenizer": {
            "unk_token": "<UNK>",
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "pad_token": "<PAD>",
            "cls_token": "<CLS>",
            "sep_token": "<SEP>",
            "mask_token": "<MASK_TOKEN>",
        },
        "GPT2Tokenizer": _GPT2_TOKENS,
        "GPTNeoXTokenizer": _GPT2_TOKENS | {"pad_token": "<|padding|>"},
        "GemmaTokenizer": {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        "LlamaTokenizer": _LLAMA_TOKENS,
        "Qwen2Tokenizer": _QWEN_TOKENS,
        "Qwen3_5Tokenizer": _QWEN_TOKENS,
    }
)
"""Classes that build their own, and the special tokens that they name where no file does."""

_OTHERS = """
Albert Bart Barthez Bartpho BertGeneration Bert BertJapanese Bertweet BigBird BioGpt Blenderbot BlenderbotSmall
ByT5 CLIP CTRL Camembert Canine Character Clvp ConvBert CpmAnt Cpm DPRContextEncoder DPRQuestionEncoder
DPRReader Deberta DebertaV2 Dia DistilBert Esm Esmc FNet FSMT FastSpeech2Conformer Flaubert Funnel
GPTNeoXJapanese GPTSw3 Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert M2M100 MBart50 MBart MLuke
MPNet Marian MarkupLM Mgpstr MobileBert Mvp MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus Perceiver Phobert
Pop2Piano ProphetNet Rag Reformer RemBert RoCBert RoFormer Roberta SeamlessM4T Siglip2 Siglip Speech2Text
SpeechT5 Splinter SqueezeBert T5 Tapas Tipsv2 Udop VideoPrism Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper XGLM
XLM XLMRoberta XLNet
"""
OTHER_CLASSES = frozenset(f"{name}Tokenizer" for name in _OTHERS.split()) | {"MistralCommonBackend"}
"""More classes with a way of their own, which transformers itself is asked for."""

_MISTRALS = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
_FIXED_RELEASE = 5
_LARGE_VOCABULARY = 100_000

_SAME_CLASS = {"CodeGenTokenizer": "GPT2Tokenizer"}
"""Names that transformers gives to another class."""

_KEEPS_THE_FILE = """
ernie4_5 ernie4_5_moe glm glm4 glm4_moe glm4_moe_lite gpt_bigcode granite granitemoe granitemoehybrid internlm2
internlm3 iquestcoder jamba kimi_k25 kimi_linear llava mimo_v2_flash minicpm3 minimax_m2 ministral3 mistral
mistral3 mixtral nemotron olmo2 olmo3 olmo_hybrid phi3 phimoe pixtral stablelm
"""
_CLASS_OF_MODEL = {
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("dbrx", "gpt2", "gptj", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("falcon_mamba", "gpt_neox", "mamba", "mamba2", "olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "recurrent_gemma"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_next", "qwen3_vl", "qwen3_vl_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), "Qwen3_5Tokenizer"),
    **dict.fromkeys(
        _KEEPS_THE_FILE.split(),
        FILE_CLASS,
    ),
}
"""Model types of mlx-lm that transformers has a class for; it goes by what the files say for the others."""

_WRONG = """
ernie4_5 ernie4_5_moe internlm2 internlm3 iquestcoder jamba llava minicpm3 minimax_m2 nemotron phi3 phimoe qwen2
qwen3_5 qwen3_5_moe
"""
_WRONG_IN_FILES = frozenset(_WRONG.split())
"""Model types whose files name a class that is not theirs; transformers takes its own."""


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """``name`` of the class, and ``source``: which file (or rule) decided for it."""

    name: str
    source: str

    @property
    def builds_its_own(self) -> bool:
        """Does it put a tokenizer of its own in place of the file's?"""
        return self.name in CLASS_TOKENS


def choose_class(model: Mapping[str, Any], tokenizer: Mapping[str, Any], byte_level: bool) -> TokenizerClass:
    """The class that transformers' AutoTokenizer takes.

    ``model`` is ``config.json``, ``tokenizer`` is ``tokenizer_config.json``; ``byte_level``: ``tokenizer.json`` speaks
    of ``ByteLevel``, which a Llama class would drop.
    """
    model_type = str(model.get("model_type") or "")
    registered = _CLASS_OF_MODEL.get(model_type)
    wrong = model_type in _WRONG_IN_FILES
    named = _name(tokenizer) or _name(model)
    source = "tokenizer_config.json" if _name(tokenizer) else "config.json"
    remote = isinstance(auto := tokenizer.get("auto_map"), Mapping | list) and (
        not isinstance(auto, Mapping) or "AutoTokenizer" in auto
    )
    if named is None:
        return TokenizerClass(
            registered or FILE_CLASS, f"for model type {model_type}" if registered else "no file names one"
        )
    if not remote and named == "LlamaTokenizer" and byte_level and not wrong:
        return TokenizerClass(FILE_CLASS, f"tokenizer.json is byte-level, against {source}'s LlamaTokenizer")
    if not remote and registered not in (None, named) and (registered == FILE_CLASS or wrong):
        return TokenizerClass(registered or FILE_CLASS, f"for model type {model_type}, against {source}'s {named}")
    return TokenizerClass(_known(named), source if _known(named) != FILE_CLASS else f"{source}: {named}")


def _name(config: Mapping[str, Any]) -> str | None:
    name = config.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) and name else None


def _known(name: str) -> str:
    """The class that transformers finds by ``name``; where it finds none, it keeps the file."""
    name = _SAME_CLASS.get(name, name)
    return name if name in CLASS_TOKENS or name in OTHER_CLASSES else FILE_CLASS


def build_as(name: str, hf: Tokenizer, options: Mapping[str, Any], named_tokens: Mapping[str, str]) -> bool:
    """Put in place of what ``tokenizer.json`` says what the class ``name`` builds around its vocabulary and merges.

    ``options`` are ``tokenizer_config.json``'s. False: the vocabulary is not of byte pairs, and nothing was changed.
    """
    model = hf.model
    if not isinstance(model, models.BPE):
        return False
    sentencepiece = name in ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
    model.byte_fallback = model.fuse_unk = sentencepiece
    unknown = named_tokens.get("unk_token", "") if name in ("CodeLlamaTokenizer", "GemmaTokenizer") else ""
    model.unk_token = unknown if model.token_to_id(unknown) is not None else None
    model.ignore_merges, model.dropout = False, None
    prefix = options.get("add_prefix_space")
    if name == "GemmaTokenizer":
        hf.normalizer = normalizers.Replace(" ", _SPACE)
        hf.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        hf.decoder = decoders.Sequence(_utf8_decoders())
    elif sentencepiece:
        _build_as_llama(hf, prefix is None or bool(prefix), name, options)
    else:
        _build_byte_level(hf, bool(prefix), name)
    _build_post_processor(hf, name, named_tokens.get("bos_token"))
    return True


def _build_as_llama(hf: Tokenizer, prefix: bool, name: str, options: Mapping[str, Any]) -> None:
    legacy = name == "LlamaTokenizer" and bool(options.get("legacy", False))
    scheme = "never" if not prefix else "always" if legacy else "first"
    hf.normalizer = None
    hf.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix or name == "CodeLlamaTokenizer" else []
    hf.decoder = decoders.Sequence([*_utf8_decoders(), *strip])


def _utf8_decoders() -> list[Any]:
    return [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


def _build_byte_level(hf: Tokenizer, prefix: bool, name: str) -> None:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    split: dict[str, Any] = {
        "CohereTokenizer": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "Qwen2Tokenizer": lambda: pre_tokenizers.Sequence([_split("qwen2"), bytes_only]),
        "Qwen3_5Tokenizer": lambda: pre_tokenizers.Sequence([_split("qwen35"), bytes_only]),
    }
    hf.normalizer = None if name == "GPT2Tokenizer" else normalizers.NFC()
    hf.pre_tokenizer = split.get(name, lambda: gpt2)()
    hf.decoder = decoders.ByteLevel()


def _split(pre: str) -> Any:
    (pattern,) = PRE_TOKENIZERS[pre].patterns
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _build_post_processor(hf: Tokenizer, name: str, bos: str | None) -> None:
    """GPT-NeoX's class adds nothing, Code Llama's always BOS; the others keep what the file says."""
    if name not in ("GPTNeoXTokenizer", "CodeLlamaTokenizer"):
        return
    bos_id = hf.token_to_id(bos) if bos is not None and name == "CodeLlamaTokenizer" else None
    first, second = ("", "") if bos_id is None else (f"{bos}:0 ", f"{bos}:1 ")
    hf.post_processor = processors.TemplateProcessing(
        single=f"{first}$A:0",
        pair=f"{first}$A:0 {second}$B:1",
        special_tokens=[] if bos is None or bos_id is None else [(bos, bos_id)],
    )


def mend_mistral(hf: Tokenizer, model: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bool:
    """``fix_mistral_regex``: Mistral's own split in place of a wrong one that conversions wrote. Was it done?

    transformers does so where asked to, for vocabularies above 100,000 of a Mistral model that a release before 5
    wrote.
    """
    written = str(model.get("transformers_version") or "0").split(".")[0]
    old = not written.isdigit() or int(written) < _FIXED_RELEASE
    kind = model.get("model_type")
    if not (tokenizer.get("fix_mistral_regex") is True and model and old and hf.pre_tokenizer is not None):
        return False
    if hf.get_vocab_size() <= _LARGE_VOCABULARY or (kind is not None and kind not in _MISTRALS):
        return False
    if isinstance(hf.pre_tokenizer, pre_tokenizers.Sequence):
        hf.pre_tokenizer[0] = _split("tekken")
    elif isinstance(hf.pre_tokenizer, pre_tokenizers.Metaspace):
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        hf.pre_tokenizer = pre_tokenizers.Sequence([_split("tekken"), bytes_only])
    else:
        hf.pre_tokenizer = pre_tokenizers.Sequence([_split("tekken"), hf.pre_tokenizer])
    return True
