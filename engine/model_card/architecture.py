"""What a configuration says of a model's layers: its class in mlx-lm, its shape, its experts."""

from collections.abc import Iterator
from importlib import metadata

from engine.errors import ModelLoadError
from engine.model_card.card import Fact
from engine.model_card.model_files import ModelFiles, as_mapping
from engine.runner.load.abstract_model import check_architecture
from engine.runner.load.model_classes import model_classes

SHAPE = {
    "layers": ("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "hidden size": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "MLP width": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "query heads": ("num_attention_heads", "n_head", "n_heads"),
    "key-value heads": ("num_key_value_heads", "n_head_kv", "num_kv_heads"),
    "head size": ("head_dim",),
}
"""Facts of a model's shape, and the entries that give them, in the order in which they are asked."""
EXPERTS = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    "used for a token": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    "shared": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "expert width": ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_dim"),
    "shared width": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
}
"""Likewise of its experts."""
_OTHER_PARTS = ("vision_config", "audio_config", "visual", "speech_config", "video_config")


def architecture(files: ModelFiles) -> Iterator[Fact]:
    """The model type, the class that runs it, and its shape."""
    words = files.words
    if words.gguf is not None:
        yield Fact("architecture", words.gguf.architecture, words.source("model_type"))
    for one, name in zip(words.all("model_type"), ("model_type", "text model_type"), strict=False):
        yield Fact(name, str(one.value), one.source)
    if names := words.values.get("architectures"):
        named = (names,) if isinstance(names, str) else tuple(map(str, names))
        yield Fact("architectures", named, words.source("architectures"))
    yield from _class(files)
    for name, keys in SHAPE.items():
        if (found := words.find(*keys)) is not None and isinstance(found.value, int):
            yield Fact(name, found.value, found.source)
    parts = [name for name in _OTHER_PARTS if as_mapping(words.values.get(name))]
    if parts:
        left_out = tuple(name.removesuffix("_config") for name in parts)
        yield Fact("left out", left_out, ", ".join(words.source(name) for name in parts))


def experts(files: ModelFiles) -> Iterator[Fact]:
    """How many experts there are, and how many a token uses; nothing for a dense model."""
    count = files.words.find(*EXPERTS["experts"])
    if count is None or not count.value:
        return
    for name, keys in EXPERTS.items():
        if (found := files.words.find(*keys)) is not None and isinstance(found.value, int):
            yield Fact(name, found.value, found.source)


def own_code(files: ModelFiles) -> str | None:
    """The Python file of the folder that builds the model, if its configuration names one. It is never run here."""
    name = files.words.values.get("model_file")
    return None if not name else str(name)


def _class(files: ModelFiles) -> Iterator[Fact]:
    """The class of mlx-lm. Its refusal is a problem, and then there is none."""
    words = files.words
    if (own := own_code(files)) is not None:
        yield Fact("own code", f"{own}: not run here", words.source("model_file"))
        if not files.args.trust_remote_code:
            files.problem(
                f"{files.resolved.name} runs its own Python file {own!r}; read it, then load with --trust-remote-code"
            )
        return
    for key, value in as_mapping(words.values.get("auto_map")).items():
        if str(key).startswith("AutoModel"):
            files.remark(f"{words.source('auto_map')} names code of its own ({value}); it is not used: mlx-lm's is")
    if files.config is None:
        return
    version = metadata.version("mlx-lm")
    try:
        check_architecture(files.config)
    except ModelLoadError as error:
        files.problem(str(error))
        yield Fact("runs as", "nothing: refused", f"mlx-lm {version}")
        return
    classes = model_classes(files.config.hf_config)
    asked = files.config.model_type
    remapped = "" if classes.module == asked else f" (in place of {asked})"
    yield Fact("runs as", f"{classes.model.__module__}.{classes.model.__name__}{remapped}", f"mlx-lm {version}")


def class_default(files: ModelFiles, name: str) -> Fact | None:
    """What mlx-lm's class takes for the entry ``name`` where no file names it."""
    if files.config is None or own_code(files) is not None:
        return None
    try:
        classes = model_classes(files.config.hf_config)
    except ValueError:  # no such type, which is noted with the architecture
        return None
    value = classes.default(name)
    return None if value is None else Fact(name, value, f"no file: the default of mlx-lm's {classes.module}")
