"""``engine.inspect``: what is understood of a model before loading. Loads no weights, runs nothing of the model's."""

import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelLoadError, ModelNotFoundError
from engine.model_card.architecture import architecture, experts, own_code
from engine.model_card.card import Fact, ModelCard, Section
from engine.model_card.model_files import ModelFiles
from engine.model_card.origin import origin
from engine.model_card.positions import caches, context, rope
from engine.model_card.privacy import names_of, shareable
from engine.model_card.templates import parsers, templates
from engine.model_card.tokens import end_tokens, named_ends, read_tokenizer, tokenizer
from engine.model_card.weights import StoredModel, parameters, quantization, read_tensors, weights
from engine.models.local import ResolvedModel, cached_snapshot
from engine.models.resolve import resolve
from engine.models.weight_format import Part
from engine.params.engine_args import EngineArgs
from engine.params.sampling_defaults import GENERATION_CONFIG_NAMES
from engine.params.sizes import size_text
from engine.runner.device.devices import Device, describe_device, prepare_backend
from engine.runner.device.placement import place

if TYPE_CHECKING:
    from engine.runner.load.abstract_model import AbstractModel

_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
"""A folder that has none of these is no model."""
_PACKAGES = ("vm-magic", "mlx", "mlx-lm", "transformers", "tokenizers")


def inspect(model: str | os.PathLike[str], **options: Any) -> ModelCard:
    """What is understood of ``model`` before loading, and from which file each fact came; ``str()`` is the text.

    ``options`` are the engine's flags: the card is of a load with them. Loads no weights and runs nothing of what the
    model's folder holds; what is broken is a line of :attr:`ModelCard.problems`. Of a model on the hub the files of its
    configuration and tokenizer are fetched. Raises ModelNotFoundError where there is no such model.
    """
    args = EngineArgs.from_options(model, options)
    resolved, refusals = _find(args)
    place(args.device)
    prepare_backend()
    files = ModelFiles(resolved, args, problems=refusals)
    sections = _sections(files)
    clean = partial(shareable, beginnings=names_of(files.folder))
    return ModelCard(
        shareable(args.model),
        tuple(Section(section.title, tuple(_clean(fact, clean) for fact in section.facts)) for section in sections),
        tuple(map(clean, files.problems)),
        tuple(map(clean, files.remarks)),
        "" if files.is_folder else clean(files.resolved.path.name),
    )


def _find(args: EngineArgs) -> tuple[ResolvedModel, list[str]]:
    """The model's files, as far as they are here or can be fetched, and why others are not."""
    errors: dict[Part, ModelNotFoundError | ModelLoadError] = {}
    found: ResolvedModel | None = None
    parts: tuple[Part, ...] = ("tokenizer", "config")  # on the hub, the first brings most of the second
    for part in parts:
        try:
            found = resolve(args.model, args.revision, part=part)
        except (ModelNotFoundError, ModelLoadError) as error:
            errors[part] = error
    folder = Path(args.model).expanduser()
    if folder.exists() or (found is not None and found.path.is_file()):
        errors.pop("tokenizer", None)  # noted where it is looked for
    else:
        folder = cached_snapshot(args.model.partition(":")[0], args.revision) or folder
    nothing = found is None and not any(next(folder.glob(pattern), None) for pattern in _MODEL_FILES)
    if nothing and isinstance(errors["config"], ModelNotFoundError):
        raise errors["config"]
    return found or ResolvedModel(args.model, folder, "folder"), [str(error) for error in errors.values()]


def _sections(files: ModelFiles) -> list[Section]:
    """All that is understood, part after part; a part that fails is a problem, and the others are there."""
    found: list[Section] = []

    def add(title: str, what: str, facts: Iterator[Fact]) -> None:
        if collected := tuple(files.collected(what, facts)):
            found.append(Section(title, collected))

    path = files.resolved.path.name
    config = "config.json" if files.is_folder else path
    add("model", path, origin(files))
    add("architecture", config, architecture(files))
    add("experts", config, experts(files))
    before = len(files.problems)
    stored = files.attempt("the weights' headers", lambda: read_tensors(files)) or StoredModel(())
    device = describe_device()
    abstract = _abstract(files, device, whole=len(files.problems) == before)
    add("rope", config, rope(files))
    add("context", config, context(files))
    if abstract is not None:
        add("layers", "the caches of mlx-lm's class", _layers(files, abstract, device))
    add("weights", "the weights", weights(files, stored))
    add("quantization", config, quantization(files, stored))
    add("size", config, _size(files, stored, abstract, device))
    _add_text(files, add, files.attempt(config, lambda: _embedding_rows(files, stored)))
    add("sampling defaults", "generation_config.json", _sampling(files))
    add("versions", "this installation", _versions())
    return found


def _add_text(files: ModelFiles, add: Callable[[str, str, Iterator[Fact]], None], rows: Fact | None) -> None:
    read = files.attempt("the tokenizer", lambda: read_tokenizer(files))
    if read is not None:
        add("tokenizer", read.file, tokenizer(files, read, rows))
    add("end tokens", "the end tokens", end_tokens(files, read, rows))
    if read is not None:
        ids = {token_id for found in named_ends(files, read).values() for token_id in found}
        add("chat templates", "the chat templates", templates(files, read, ids))
        add("parsers", "the parsers", parsers(files, read))


def _abstract(files: ModelFiles, device: Device, *, whole: bool) -> "AbstractModel | None":
    """The model without its weights, as a plan and a load ask for it; a refusal is a problem.

    Where the files are not ``whole``, which was noted, the configuration alone says what its layers are.
    """
    from engine.runner.load.abstract_model import AbstractModel, build_abstract_model, check_architecture
    from engine.runner.load.loader import WEIGHT_READERS

    config = files.config
    if config is None or own_code(files) is not None:
        return None  # said already, and a class of the folder's own is not run here

    def build() -> "AbstractModel":
        check_architecture(config)
        if not whole:
            return AbstractModel(build_abstract_model(config), 0)
        return WEIGHT_READERS[files.resolved.kind].abstract(files.resolved, config, files.args, device)

    return files.attempt("the model without its weights", build)


def _layers(files: ModelFiles, abstract: "AbstractModel", device: Device) -> Iterator[Fact]:
    from engine.runner.kv.kv_spec import ModelCaches

    assert files.config is not None, "a model was built of it"
    chunk = min(files.args.batched_tokens(device.chunk_size), files.config.context_length)
    yield from caches(files, ModelCaches(abstract.model), chunk)


def _size(files: ModelFiles, stored: StoredModel, abstract: "AbstractModel | None", device: Device) -> Iterator[Fact]:
    """Parameters, and the memory that the weights would take here."""
    count = None
    if abstract is not None:
        from engine.runner.load.model_classes import num_parameters

        count = num_parameters(abstract.model)
    yield from parameters(count, files, stored)
    if abstract is not None and abstract.num_bytes:
        yield Fact(
            "in memory", size_text(abstract.num_bytes), f"the plan for this device: {device.kind}, {device.name}"
        )


def _embedding_rows(files: ModelFiles, stored: StoredModel) -> Fact | None:
    """Ids that the model can take: the rows of its embedding, else what the configuration says."""
    said = files.words.find("vocab_size")
    table = stored.embedding
    if table is None:
        is_number = said is not None and isinstance(said.value, int)
        return Fact("embedding rows", said.value, said.source) if said is not None and is_number else None
    rows, source = table.shape[0], f"{table.file}: {table.name}"
    if said is not None and said.value != rows:
        files.problem(f"{said.source} is {said.value}, and the embedding has {rows} rows ({source})")
    return Fact("embedding rows", rows, source)


def _sampling(files: ModelFiles) -> Iterator[Fact]:
    """What the model's authors recommend, and what takes its place."""
    name = "generation_config.json"
    choice, config = files.args.generation_config, files.config
    if files.is_folder and choice == "auto" and not files.has(name):
        files.remark(f"no {name}: sampling follows vLLM's defaults")
    values = files.json(name) if config is None else dict(config.generation_config)
    own = name if config is None else " of ".join(filter(None, [config.sampling_source, config.model_card]))
    origin = own if choice == "auto" else f"--generation-config {choice}"
    layers = ((origin, values), ("--override-generation-config", dict(files.args.override_generation_config)))
    found: dict[str, Fact] = {}
    for source, layer in layers:
        for theirs, ours in GENERATION_CONFIG_NAMES.items():
            if layer.get(theirs) is not None:
                value = layer[theirs]
                found[ours] = Fact(ours, value if isinstance(value, int | float) else str(value), f"{source}: {theirs}")
    yield from found.values()
    if values.get("do_sample") is False and (found.keys() & {"temperature", "top_p", "top_k"}):
        files.remark(f"{origin}: do_sample is false beside sampling values; these are used, as vLLM does")


def _versions() -> Iterator[Fact]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    yield Fact("packages", tuple(f"{package} {version(package)}" for package in _PACKAGES), "installed")
    yield Fact("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", "this process")


def _clean(fact: Fact, clean: Callable[[str], str]) -> Fact:
    value = fact.value
    if isinstance(value, str):
        value = clean(value)
    elif isinstance(value, tuple):
        value = tuple(map(clean, value))
    elif isinstance(value, float) and not math.isfinite(value):  # which JSON has not
        value = str(value)
    return replace(fact, name=clean(fact.name), value=value, source=clean(fact.source))
