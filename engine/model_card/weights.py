"""What the weights' files hold: bytes by element type, parameters, quantization; from headers, never from data."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from engine.errors import ModelNotFoundError
from engine.format.text import listed
from engine.model_card.card import Fact
from engine.model_card.model_files import Found, ModelFiles, as_mapping
from engine.model_card.origin import snapshot_commit
from engine.model_card.stored_tensors import StoredTensor, read_header
from engine.models.folder import missing_shards
from engine.models.weight_format import Wanted
from engine.params.sizes import size_text

INDEX = "model.safetensors.index.json"
_DECLARED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_OTHER_PARTS = (
    "vision_tower",
    "vision_model",
    "visual",
    "audio_tower",
    "audio_model",
    "multi_modal_projector",
    "embed_vision",
    "embed_audio",
    "mm_projector",
)
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "token_embd.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_PACKED = (".scales", ".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", "_scales", "_blocks")
"""Ends of the names of tensors that only quantized models have."""


@dataclass(frozen=True)
class StoredModel:
    """All tensors of a model that are here."""

    tensors: tuple[StoredTensor, ...]

    @cached_property
    def bytes_by_dtype(self) -> Counter[str]:
        """Bytes of each element type."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.num_bytes
        return sizes

    @property
    def embedding(self) -> StoredTensor | None:
        """The table of token embeddings, which has a row for each id that the model can take."""
        text = (one for one in self.tensors if not is_other_part(one.name))
        return next((one for one in text if one.name.endswith(_EMBEDDINGS) and len(one.shape) == 2), None)

    @property
    def text_values(self) -> int:
        """Elements of the tensors of the language model."""
        return sum(tensor.num_values for tensor in self.tensors if not is_other_part(tensor.name))


def is_other_part(name: str) -> bool:
    """Whether a tensor belongs to a part that sees or hears."""
    return any(f".{part}." in f".{name}" for part in _OTHER_PARTS)


def read_tensors(files: ModelFiles) -> StoredModel:
    """The tensors of every file that is here; a file that cannot be read is a problem."""
    if files.gguf is not None:
        infos = files.gguf.tensors.values()
        name = files.resolved.path.name
        return StoredModel(
            tuple(StoredTensor(name, one.name, one.type.name, one.shape, one.num_bytes) for one in infos)
        )
    files.json(INDEX)  # whose fault is noted first
    found: list[StoredTensor] = []
    for path in sorted(files.folder.glob("model*.safetensors")) if files.is_folder else ():
        found += files.collected(path.name, read_header(path))
    return StoredModel(tuple(found))


def weights(files: ModelFiles, stored: StoredModel) -> Iterator[Fact]:
    """Files, bytes by element type, and what contradicts the configuration."""
    names = sorted({tensor.file for tensor in stored.tensors})
    if names:
        source = "the headers of the files" if files.is_folder else f"{names[0]}: its header"
        total = sum(stored.bytes_by_dtype.values())
        yield Fact(
            "stored", f"{size_text(total)} in {_counted(len(names), 'file')}, {len(stored.tensors)} tensors", source
        )
        types = tuple(f"{dtype} {size_text(size)}" for dtype, size in stored.bytes_by_dtype.most_common())
        yield Fact("element types", types, source)
        other = sum(tensor.num_bytes for tensor in stored.tensors if is_other_part(tensor.name))
        if other:
            yield Fact("not loaded", f"{size_text(other)} of vision and audio", source)
    if files.is_folder:
        yield from _index(files, stored)
    declared = files.words.find("torch_dtype", "dtype")
    if declared is not None and files.words.gguf is None:
        yield Fact("declared type", str(declared.value), declared.source)
        _note_type(files, stored, declared)
    _note_head(files, stored)


def _index(files: ModelFiles, stored: StoredModel) -> Iterator[Fact]:
    """What the index says, and whether the files agree; a load's own refusal where some are missing."""
    index = files.json(INDEX)
    weight_map = as_mapping(index.get("weight_map"))
    if weight_map:
        named = {str(name) for name in weight_map.values()}
        yield Fact("index", f"{len(weight_map)} tensors in {_counted(len(named), 'file')}", f"{INDEX}: weight_map")
        here = {tensor.name for tensor in stored.tensors}
        if gone := sorted(set(weight_map) - here):
            if stored.tensors:
                files.problem(f"{INDEX} names {_counted(len(gone), 'tensor')} that no file here has ({gone[0]} …)")
        elif missing := sorted(named - {tensor.file for tensor in stored.tensors}):
            files.remark(f"{INDEX} names {listed(missing)}, which are not here; all its tensors are, in other files")
        if unnamed := sorted({tensor.file for tensor in stored.tensors} - named):
            files.remark(f"{INDEX} does not name {listed(unnamed)}, which mlx-lm reads as well")
    elif index:
        files.problem(f"{INDEX}: has no weight_map; fetch the file again")
    if not stored.tensors and (size := as_mapping(index.get("metadata")).get("total_size")):
        yield Fact("stored", f"{size_text(float(size))}, not here", f"{INDEX}: metadata.total_size")
    _note_missing(files)


def _note_missing(files: ModelFiles) -> None:
    """Weights that are not here: a problem in a load's words; a remark for a model that a load would fetch first."""
    wanted = Wanted(files.resolved.name, "", "weights")
    missing = _missing(files)
    if not missing:
        return
    if snapshot_commit(files.folder) is None:
        try:
            files.resolved.format.open(files.folder, wanted)
        except ModelNotFoundError as error:
            files.problem(str(error))
        return
    files.remark(f"the weights are not here ({listed(missing)}): a load fetches them")


def _missing(files: ModelFiles) -> list[str]:
    """Weight files that a load would look for in vain; none where the index cannot be read, which was noted."""
    if files.has(INDEX) and not as_mapping(files.json(INDEX).get("weight_map")):
        return []
    return missing_shards(files.folder)


def parameters(num_parameters: int | None, files: ModelFiles, stored: StoredModel) -> Iterator[Fact]:
    """How many parameters the model has: as its class counts them, else as the files do where nothing is packed."""
    if num_parameters is not None:
        yield Fact(
            "parameters",
            _count_text(num_parameters),
            "mlx-lm's class, built of its configuration",
        )
    elif stored.tensors and (files.gguf is not None or stored.bytes_by_dtype.keys() <= {"F64", "F32", "F16", "BF16"}):
        count = stored.text_values
        yield Fact("parameters", _count_text(count), "the headers of the files")


def quantization(files: ModelFiles, stored: StoredModel) -> Iterator[Fact]:
    """Format, bits, groups and how many layers differ, wherever it is said; places that differ are a problem."""
    if files.gguf is not None:
        kinds = sorted(stored.bytes_by_dtype.keys() - {"F32", "F16", "BF16"})
        if kinds:
            yield Fact("format", tuple(kinds), f"{files.resolved.path.name}: its tensors")
        return
    found = [(one, read_quantization(one.value)) for one in _said(files)]
    shown: dict[str, Fact] = {}
    for one, said in found:
        text = ", ".join(f"{key} {value}" for key, value in said.items()) or "nothing that is known"
        file, _, name = one.source.rpartition(": ")
        name = name if file == files.words.file else file
        same = shown.get(text)
        shown[text] = (
            Fact(name, text, one.source) if same is None else replace(same, source=f"{same.source}; {one.source}")
        )
    yield from shown.values()
    for (first, says), (second, differs) in pairwise(found):
        for key in sorted(says.keys() & differs.keys()):
            if says[key] != differs[key]:
                files.problem(f"{first.source} says {key} {says[key]}, and {second.source} {differs[key]}")
    packed = any(tensor.name.endswith(_PACKED) for tensor in stored.tensors)
    if found and stored.tensors and not packed and not _missing(files):
        files.remark(f"{found[0][0].source} is there, and no weight is stored with scales: nothing is quantized")
    if packed and not found and files.words.values:
        files.problem(f"the files hold packed weights, and neither {files.words.file} nor another file says how")


def read_quantization(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``quantization`` or a ``quantization_config`` says, in few words: one mapping for every spelling.

    Kept to this function: the one place to ask another reader of the same entries.
    """
    said = {**said, **as_mapping(said.get("quantization"))}
    found: dict[str, Any] = {}
    for name, keys in (
        ("format", ("quant_method", "quant_algo", "format")),
        ("bits", ("bits", "w_bit", "num_bits")),
        ("group", ("group_size", "q_group_size")),
        ("mode", ("mode",)),
        ("scheme", ("format", "quant_algo", "fmt")),
        ("blocks", ("weight_block_size",)),
    ):
        value = next((said[key] for key in keys if said.get(key) is not None), None)
        if value is not None and value not in found.values():
            found[name] = value
    for group in as_mapping(said.get("config_groups")).values():  # compressed-tensors
        inner = as_mapping(as_mapping(group).get("weights"))
        found |= {name: inner[key] for name, key in (("bits", "num_bits"), ("group", "group_size")) if inner.get(key)}
    own = {key: value for key, value in said.items() if "." in key and (isinstance(value, Mapping) or value is False)}
    if own:
        bits = sorted({str(value["bits"]) for value in own.values() if value and "bits" in value})
        left = sum(value is False for value in own.values())
        found["layers of their own"] = f"{len(own)}" + (f" ({', '.join(bits)} bits)" if bits else "")
        if left:
            found["layers left as they are"] = left
    return found


def _said(files: ModelFiles) -> list[Found]:
    """Every place that says something of a quantization."""
    found = [*files.words.all("quantization"), *files.words.all("quantization_config")]
    if files.has("hf_quant_config.json") and (other := files.json("hf_quant_config.json")):
        found.append(Found(other, "hf_quant_config.json: quantization"))
    for one in found:
        if not isinstance(one.value, Mapping):
            files.problem(f"{one.source} is not an object; a load would fail on it")
    return [one for one in found if isinstance(one.value, Mapping)]


def _note_type(files: ModelFiles, stored: StoredModel, declared: Found) -> None:
    """Most of the floating values are of another type than the configuration says."""
    floating = {name: size for name, size in stored.bytes_by_dtype.items() if name in _DECLARED.values()}
    most = max(floating, key=lambda name: floating[name], default=None)
    wanted = _DECLARED.get(str(declared.value).removeprefix("torch."))
    if most is not None and wanted is not None and most != wanted:
        files.remark(
            f"{declared.source} is {declared.value}, and most floating values are stored as {most}: those count"
        )


def _note_head(files: ModelFiles, stored: StoredModel) -> None:
    """An output layer that is stored although it is the embedding, or missing although it is not."""
    tied = files.words.find("tie_word_embeddings")
    if tied is None or not stored.tensors or files.gguf is not None or _missing(files):
        return
    head = next((one.name for one in stored.tensors if one.name.endswith("lm_head.weight")), None)
    if tied.value and head is not None:
        files.remark(f"{tied.source} is true, and {head} is stored too: the embedding is used")
    elif tied.value is False and head is None and stored.embedding is not None:
        files.remark(f"{tied.source} is false, and no lm_head.weight is stored")


def _count_text(count: int) -> str:
    """``134.5 million (134515008)``."""
    if count < 10**6:
        return str(count)
    text = f"{count / 1e9:.2f} billion" if count >= 10**9 else f"{count / 1e6:.1f} million"
    return f"{text} ({count})"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
