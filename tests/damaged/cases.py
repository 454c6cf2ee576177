"""Cases by number: the same number is the same damage to the same model, whatever was tried before."""

import copy
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf

from tests.damaged import whole
from tests.damaged.gguf_parts import GGUFParts

_NOTHING = object()
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**5, 10**9, 2**31, 2**32 + 1, 2**63, 10**30, -(10**9), 0.5, 2.0, 1e308,
    math.nan, math.inf, -math.inf, "", "x", "7", "\ud800", "\x00", "x" * 5000, "{{ 1 / 0 }}", "{% for", [], [1, 2],
    ["a"], [None], [[]], [10**9], {}, {"a": 1}, {"0": None}, _NOTHING,
)  # fmt: skip
"""What takes the place of an entry; the last: the entry is not there."""
_DEEP = b"[" * 100_000
_PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"


@dataclass(frozen=True)
class Case:
    """A damaged model: ``path`` under ``root`` is what a user names, ``what`` was done to it."""

    number: int
    what: str
    path: Path


def write(number: int, root: Path) -> Case:
    """Write case ``number`` into ``root``, an empty folder."""
    rng = random.Random(f"damaged {number}")
    if rng.random() < 0.35:
        what, data = _damaged_gguf(rng)
        path = root / "model.gguf"
        path.write_bytes(data)
        return Case(number, what, path)
    kind = rng.choice(_FOLDERS)
    files = dict(_folder(kind))
    what = [_damage_folder(rng, files) for _ in range(1 if rng.random() < 0.9 else 2)]
    folder = root / "model"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Case(number, f"{' '.join(map(str, kind))}: {'; '.join(what)}", folder)


def write_whole(root: Path, **entries: Any) -> Path:
    """A whole llama's folder in ``root``, with other ``entries`` in its configuration."""
    folder = root / "model"
    folder.mkdir()
    for name, data in _folder(_FOLDERS[0]).items():
        (folder / name).write_bytes(data if name != "config.json" else _dump({**json.loads(data), **entries}))
    return folder


_FOLDERS = (
    ("llama", False, False), ("llama", True, False), ("llama", False, True), ("gemma3_text", False, False),
    ("qwen3_moe", False, False), ("qwen3_5", False, False),
)  # fmt: skip


@cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="whole"))


@cache
def _folder(kind: tuple[str, bool, bool]) -> whole.Files:
    name, packed, shards = kind
    return whole.folder(name, _scratch(), packed=packed, shards=shards)


def _damage_folder(rng: random.Random, files: whole.Files) -> str:
    names = sorted(files)
    weights = {"config.json": 8, "tokenizer.json": 4, "tokenizer_config.json": 3, "model.safetensors": 3}
    name = rng.choices(names, [weights.get(name, 1.5) for name in names])[0]
    roll = rng.random()
    try:
        if name.endswith(".json") and roll < 0.8:
            value = json.loads(files[name])
            add = name in ADDED and rng.random() < 0.2
            value, what = _with_more(rng, value, ADDED[name]) if add else _damaged_json(rng, value)
            files[name] = _dump(value)
            return f"{name}: {what}"
        if name.endswith(".safetensors") and roll < 0.6:
            files[name], what = _damaged_header(rng, files[name])
            return f"{name}: {what}"
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):  # damaged before, or nothing in it
        pass
    data, what = _damaged_bytes(rng, files[name])
    if data is None:
        del files[name]
    else:
        files[name] = data
    return f"{name}: {what}"


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _damaged_json(rng: random.Random, value: Any) -> tuple[Any, str]:
    """One entry, wherever it stands, is another."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    shallow = [place for place in places if len(place) <= 2]
    place = rng.choice(shallow if shallow and rng.random() < 0.7 else places)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    new = rng.choice(VALUES)
    if rng.random() < 0.1:
        new = rng.choice(_more(parent[place[-1]]))
    if new is _NOTHING:
        del parent[place[-1]]
        return value, f"without {'.'.join(map(str, place))}"
    parent[place[-1]] = new
    return value, f"{'.'.join(map(str, place))} = {str(new)[:30]!r}"


ADDED: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json": {
        "quantization": ({"group_size": 32, "bits": 4}, {"group_size": 0, "bits": 4}, {"bits": 4}, {"mode": "x"}),
        "quantization_config": tuple(
            {"quant_method": method} for method in ("awq", "gptq", "fp8", "mxfp4", "compressed-tensors", "modelopt")
        ),
        "layer_types": (["full_attention"], ["full_attention"] * 10**5, ["x", "y"]),
        "rope_parameters": ({"full_attention": {"rope_theta": 0}}, {"rope_type": "yarn"}, {"rope_type": "longrope"}),
        "sliding_window": (-5, 0, 10**12),
        "num_experts": (10**9, 65_000, 3),
        "text_config": ({"hidden_size": 64}, {"model_type": "x"}, {"num_hidden_layers": 10**6}),
        "model_file": ("modeling.py", "../x.py"),
        "auto_map": ({"AutoModelForCausalLM": "x.Y"}, {"AutoConfig": 3}),
        "tokenizer_class": ("T5Tokenizer", "LlamaTokenizer"),
        "per_layer_config": ({"0": {"head_dim": 3}},),
        "attn_config": ({"rope_theta": 3},),
        "partial_rotary_factor": (0.0, 1e9, -1),
    },
    "tokenizer_config.json": {
        "tokenizer_class": ("T5Tokenizer", "LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer", "BertTokenizer",
                            "CohereTokenizer", "CodeLlamaTokenizer", "GPT2Tokenizer", "XLNetTokenizer", "NoSuch"),
        "extra_special_tokens": ({"x_token": "<|im_end|>"}, ["<|im_end|>"], {"x_token": {"content": 3}}),
        "add_prefix_space": (True,),
        "split_special_tokens": (True,),
        "auto_map": ({"AutoTokenizer": ["x.Y", None]},),
        "fast_tokenizer_files": (["tokenizer.json"],),
    },
    "tokenizer.json": {
        "normalizer": ({"type": "Precompiled", "precompiled_charsmap": "AAAA"},
                       {"type": "Precompiled", "precompiled_charsmap": "//////8AAAA="},
                       {"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}),
        "model": ({"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}, {"type": "Unigram", "vocab": []},
                  {"type": "WordPiece", "vocab": {}, "unk_token": "x", "continuing_subword_prefix": "##",
                   "max_input_chars_per_word": 0}, {"type": "BPE", "vocab": {}, "merges": []},
                  {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"}),
        "post_processor": ({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                            "pair": [], "special_tokens": {}},
                           {"type": "BertProcessing", "sep": ["x", 10**9], "cls": ["y", 10**9]}),
        "pre_tokenizer": ({"type": "Split", "pattern": {"Regex": "(a*)*b"}, "behavior": "Isolated", "invert": False},
                          {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": False}),
        "added_tokens": ([{"id": 10**9, "content": "far", "special": True, "single_word": False, "lstrip": False,
                           "rstrip": False, "normalized": False}],),
        "truncation": ({"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"},),
    },
    "generation_config.json": {
        "eos_token_id": (10**9, [10**12], "</s>", [None]),
        "repetition_penalty": (0, math.nan), "max_new_tokens": (-1, "x"), "min_p": (7,), "stop_strings": (3,),
    },
}  # fmt: skip
"""Entries by file that the whole models lack, or have otherwise, with values that somebody may write there."""


def _with_more(rng: random.Random, value: Any, entries: dict[str, tuple[Any, ...]]) -> tuple[Any, str]:
    name = rng.choice(list(entries))
    new = rng.choice([*entries[name], rng.choice([one for one in VALUES if one is not _NOTHING])])
    return {**value, name: new}, f"{name} = {str(new)[:60]!r}"


def _more(value: Any) -> tuple[Any, ...]:
    """Values near the one that is there."""
    if isinstance(value, bool) or value is None:
        return (1,)
    if isinstance(value, int | float):
        return (value + 1, value * 2, -value, str(value), float(value), [value], value * 10**6)
    if isinstance(value, str):
        return (value.upper(), value + "x", [value], value.encode().hex(), {"content": value})
    if isinstance(value, list):
        return (value * 2, value[:-1], list(reversed(value)), dict(enumerate(value)))
    return (list(value.items()), {**value, "more": 1}, list(value))


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from _places(inner, (*at, key))


def _damaged_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file whose header, or the length of it, is another."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        length = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + data[8:], f"a header of {length} bytes"
    header, what = _damaged_json(rng, json.loads(data[8 : 8 + size]))
    if rng.random() < 0.2:
        dtype = rng.choice(["I32", "U8", "F64", "I64", "BOOL", "F16", "BF16", "F8_E4M3", "X"])
        header = json.loads(data[8 : 8 + size])
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name]["dtype"] = dtype
        what = f"{name} is {dtype}"
    raw = _dump(header)
    return len(raw).to_bytes(8, "little") + raw + data[8 + size :], what


def _damaged_bytes(rng: random.Random, data: bytes) -> tuple[bytes | None, str]:
    """A file whose bytes are others, or that is none any more."""
    at = rng.randrange(max(1, len(data)))
    kinds: tuple[tuple[str, Callable[[], bytes | None]], ...] = (
        ("missing", lambda: None),
        ("empty", lambda: b""),
        (f"cut at {at}", lambda: data[:at]),
        (f"cut at {len(data) - 1}", lambda: data[:-1]),
        ("bits flipped", lambda: _flipped(rng, data, rng.randint(1, 8))),
        ("bits flipped at its beginning", lambda: _flipped(rng, data[:200], 4) + data[200:]),
        (f"zeros from {at}", lambda: data[:at] + bytes(len(data) - at)),
        ("a web page", lambda: _PAGE),
        ("a pointer", lambda: _POINTER),
        ("UTF-16", lambda: data[:2000].decode("latin-1").encode("utf-16")),
        ("Latin-1", lambda: b"\xe9" + data),
        ("with a byte order mark", lambda: b"\xef\xbb\xbf" + data),
        ("lists in lists", lambda: _DEEP),
        ("null", lambda: b"null"),
        ("a list", lambda: b"[]"),
        ("an empty object", lambda: b"{}"),
        ("twice", lambda: data + data),
    )
    what, make = rng.choice(kinds)
    return make(), what


def _flipped(rng: random.Random, data: bytes, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@cache
def _gguf(number: int) -> GGUFParts:
    kinds = gguf.GGMLQuantizationType
    return (
        whole.gguf_file(),
        whole.gguf_file(sentencepiece=True),
        whole.gguf_file(kind=kinds.Q4_0),
        whole.gguf_file(kind=kinds.Q8_0),
    )[number]


def _damaged_gguf(rng: random.Random) -> tuple[str, bytes]:
    number = rng.randrange(4)
    parts = copy.deepcopy(_gguf(number))
    roll = rng.random()
    if roll < 0.55:
        what = _damage_metadata(rng, parts)
    elif roll < 0.85:
        what = _damage_tensors(rng, parts)
    else:
        data, what = _damaged_bytes(rng, parts.to_bytes())
        return f"GGUF {number}: {what}", data or b""
    return f"GGUF {number}: {what}", parts.to_bytes()


_TYPED: tuple[tuple[int, Any], ...] = (
    (4, 0), (4, 1), (4, 3), (4, 10**5), (4, 10**9), (4, 2**32 - 1), (5, -1), (10, 2**63), (11, -(2**62)), (7, True),
    (6, math.nan), (6, math.inf), (6, 0.0), (6, -1.0), (12, 1e308), (8, ""), (8, "x"), (8, b"\xff\xfe"), (8, "7"),
    (9, (4, [])), (9, (4, [1, 2])), (9, (8, ["a", "b"])), (9, (8, [""])), (9, (5, [-1] * 300)), (9, (6, [math.nan])),
    (9, (9, [(4, [1]), (4, [2])])), (9, (4, [10**9] * 300)), (8, "{% for"), (9, (7, [True])),
)  # fmt: skip


def _damage_metadata(rng: random.Random, parts: GGUFParts) -> str:
    key = rng.choice(list(parts.metadata))
    kind, value = parts.metadata[key]
    roll = rng.random()
    if roll < 0.15:
        del parts.metadata[key]
        return f"without {key}"
    if roll < 0.3 and kind in (8, 9):
        parts.lengths[key] = rng.choice([0, 1, 10**6, 2**32, 2**40, 2**62, 2**64 - 1])
        return f"{key} of stated length {parts.lengths[key]}"
    if roll < 0.5 and kind == 9:
        item, items = copy.deepcopy(value)
        at = rng.randrange(len(items))
        if item == 8:
            items[at] = rng.choice(["", " ", "a", "a b c", "\x00", b"\xff", "x" * 10**5, items[0]])
        else:
            items[at] = rng.choice([0, 1, 6, 99]) if item != 6 else rng.choice([math.nan, math.inf, -math.inf])
        if rng.random() < 0.3:
            items = items[: rng.randrange(len(items))]
        parts.metadata[key] = (9, (item, items))
        return f"{key}[{at}] = {str(items[at])[:20] if at < len(items) else 'cut'!r}"
    parts.metadata[key] = rng.choice(_TYPED)
    if rng.random() < 0.1:
        more = f"llama.{rng.choice(['rope.scaling.type', 'expert_count', 'attention.sliding_window', 'foo'])}"
        parts.metadata[more] = rng.choice(_TYPED)
    return f"{key} = {str(parts.metadata[key])[:40]}"


def _damage_tensors(rng: random.Random, parts: GGUFParts) -> str:
    huge = (0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
    tensor = rng.choice(parts.tensors)
    roll = rng.randrange(9)
    if roll == 0:
        parts.num_tensors = rng.choice((0, 1, 2, 10**6, *huge))
        return f"{parts.num_tensors} tensors stated"
    if roll == 1:
        parts.num_fields = rng.choice((0, 1, 2, 10**6, *huge))
        return f"{parts.num_fields} fields stated"
    if roll == 2:
        tensor.offset = rng.choice((1, 32, 10**6, *huge))
        return f"{tensor.name} at {tensor.offset}"
    if roll == 3:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(huge)
        return f"{tensor.name} of {tensor.dims}"
    if roll == 4:
        tensor.dims = rng.choice(([], tensor.dims[:1], [*tensor.dims, 1], [1] * 100_000, tensor.dims[::-1], [0, 0]))
        return f"{tensor.name} of {str(tensor.dims)[:40]}"
    if roll == 5:
        tensor.kind = rng.choice([*range(42), 2**32 - 1])
        return f"{tensor.name} of type {tensor.kind}"
    if roll == 6:
        old = tensor.name
        tensor.name = rng.choice(["", "x", "blk.99.attn_q.weight", "blk.-1.x.weight", parts.tensors[0].name, "é" * 99])
        return f"{old} is called {tensor.name[:20]!r}"
    if roll == 7:
        parts.tensors.remove(tensor)
        return f"without {tensor.name}"
    parts.version = rng.choice([0, 1, 2, 4, 2**24 * 3, 2**32 - 1])
    return f"version {parts.version}"
