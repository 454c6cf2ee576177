"""Folders as tools lay them out: configurations in today's words, weights in one file or many, whole or not."""

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from tests.checkpoints.quantized import Checkpoint
from tests.checkpoints.saved_again import SCALINGS, original_config, saved_again
from tests.engine.parity.tiny_architectures import build, config_of

_DIMS = 16
"""Elements of a head that turn in the tiny models whose factors depend on it."""
SAVED = {
    "cohere2": "default", "deepseek_v3": "yarn", "exaone": "llama3", "gemma3": "linear", "gemma3_text": "linear",
    "gemma4_text": "default", "glm": "linear", "gpt_oss": "yarn of fractions",
    "granite": "default", "granitemoehybrid": "default", "lfm2": "default", "llama": "llama3", "mixtral": "default",
    "olmo3": "yarn", "phi3": "longrope", "qwen2": "yarn", "qwen3_5": "default", "qwen3_moe": "yarn",
    "qwen3_vl_moe": "default", "smollm3": "linear",
}  # fmt: skip
"""Model type -> its RoPE, in folders that transformers 5 saved again."""

_STATED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"routed_scaling_factor": 1.0},
    "gemma4_text": {"use_double_wide_mlp": False, "final_logit_softcapping": 30.0},
    "glm": {"attention_bias": False},
}
"""What has another default in transformers than in mlx-lm."""
_TEXT_TYPES = {"gemma3": "gemma3_text"}


def original(name: str) -> dict[str, Any]:
    """``config.json`` of one of :data:`SAVED` as its authors wrote it."""
    config = original_config(name, SCALINGS[SAVED[name]], _DIMS)
    stated = {"tie_word_embeddings": False, **_STATED.get(name, {})}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] |= {"model_type": _TEXT_TYPES.get(name, f"{name}_text"), **stated}
    return {**config, "torch_dtype": "float32", **stated}


def write_original(name: str, folder: Path) -> None:
    """The folder before it was saved again."""
    _write(folder, original(name), _tensors_of(original(name)))


def write_saved(name: str, folder: Path) -> None:
    """The folder with the configuration that transformers 5 writes."""
    saved = saved_again(original(name), name)[0]
    _write(folder, {**saved, "bos_token_id": None, "eos_token_id": None}, _tensors_of(original(name)))


def _tensors_of(config: dict[str, Any]) -> dict[str, mx.array]:
    return dict(tree_flatten(build(config).parameters()))


def _llama(**changes: Any) -> dict[str, Any]:
    return {**config_of("llama"), "num_hidden_layers": 2, "torch_dtype": "float32", **changes}


def _write(folder: Path, config: dict[str, Any], *files: dict[str, mx.array], numbers: int | None = None) -> None:
    """A folder of ``files``, numbered of ``numbers`` where there is more than one or that is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    total = numbers or len(files)
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{total:05}.safetensors" if total > 1 else "model.safetensors"
        mx.save_safetensors(str(folder / name), tensors, metadata={"format": "mlx"})


def _halves(config: dict[str, Any]) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    tensors = sorted(_tensors_of(config).items())
    middle = len(tensors) // 2
    return dict(tensors[:middle]), dict(tensors[middle:])


def _index(
    folder: Path, *names: str, tensors: tuple[str, ...] = ("model.embed_tokens.weight", "model.norm.weight")
) -> None:
    weight_map = dict(zip(tensors, names, strict=False))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _in_one_file(folder: Path, **changes: Any) -> None:
    config = _llama(**changes)
    _write(folder, config, _tensors_of(_llama()))


def _in_two_files(folder: Path) -> None:
    _write(folder, _llama(), *_halves(_llama()))


def _with_an_index_of_other_files(folder: Path) -> None:
    _in_one_file(folder)
    _index(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _without_the_second_file(folder: Path) -> None:
    _write(folder, _llama(), _halves(_llama())[0], numbers=2)


def _with_half_of_an_index(folder: Path) -> None:
    _without_the_second_file(folder)
    _index(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _with_a_tensor_twice(folder: Path) -> None:
    first, second = _halves(_llama())
    _write(folder, _llama(), first, {**second, **dict(list(first.items())[:1])})


def _under_another_name(folder: Path) -> None:
    _in_one_file(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def _of_pytorch(folder: Path) -> None:
    _in_one_file(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _as_a_pointer(folder: Path) -> None:
    _in_one_file(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def _cut_short(folder: Path) -> None:
    _in_one_file(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _without_a_tensor(folder: Path) -> None:
    _write(folder, _llama(), {name: value for name, value in _tensors_of(_llama()).items() if "norm" not in name})


def _with_a_tensor_too_many(folder: Path) -> None:
    _write(folder, _llama(), {**_tensors_of(_llama()), "model.adapter.weight": mx.zeros((2, 2))})


def _with_old_frequencies(folder: Path) -> None:
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(8)}
    _write(folder, _llama(), {**_tensors_of(_llama()), **stale})


def _of_another_shape(folder: Path) -> None:
    _write(folder, _llama(intermediate_size=64), _tensors_of(_llama()))


def _telling(**changes: Any) -> Callable[[Path], None]:
    return partial(_in_one_file, **changes)


LAYOUTS: dict[str, Checkpoint] = {
    "one file": Checkpoint(_in_one_file),
    "numbered files, no index": Checkpoint(_in_two_files),
    "an index of other files than are there": Checkpoint(_with_an_index_of_other_files),
    "a numbered file missing, no index": Checkpoint(
        _without_the_second_file, "model-00002-of-00002.safetensors missing"
    ),
    "a file of the index missing": Checkpoint(_with_half_of_an_index, "model-00002-of-00002.safetensors missing"),
    "a tensor in two files": Checkpoint(_with_a_tensor_twice, "both hold"),
    "files under another name": Checkpoint(_under_another_name, "only model*.safetensors are read"),
    "PyTorch weights only": Checkpoint(_of_pytorch, "has PyTorch weights only"),
    "a pointer of Git LFS": Checkpoint(_as_a_pointer, "run `git lfs pull`"),
    "a file that is cut short": Checkpoint(_cut_short, "cut short"),
    "a tensor missing": Checkpoint(_without_a_tensor, "Missing 5 parameters"),
    "a tensor too many": Checkpoint(_with_a_tensor_too_many, "Received 1 parameters not in model"),
    "stored frequencies of RoPE": Checkpoint(_with_old_frequencies),
    "weights of another shape": Checkpoint(_of_another_shape, "Expected shape"),
    "a type that mlx-lm lacks": Checkpoint(_telling(model_type="spiral"), "model_type 'spiral' is not supported"),
    "a Python file of its own": Checkpoint(_telling(model_file="own.py"), "--trust-remote-code"),
    "an unknown type of RoPE": Checkpoint(_telling(rope_parameters={"rope_type": "spiral"}), "RoPE type 'spiral'"),
    "heads of single layers": Checkpoint(_telling(per_layer_config={"1": {"head_dim": 8}}), "per_layer_config"),
    "an entry missing": Checkpoint(_telling(hidden_size=None), "config.json is incomplete"),
}
"""What a folder holds -> how it is written, and what becomes of it."""


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(size))
    return found
