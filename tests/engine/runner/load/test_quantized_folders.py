"""Folders in the formats of many quantization tools: billed as they load, mlx-lm's tokens, or refused by name."""

import json
import math
import pkgutil
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import ModelLoadError
from engine.models.local import ResolvedModel
from engine.models.model_config import read_model_config
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device

mx = pytest.importorskip("mlx.core")

import mlx_lm.models  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from engine.llm import LLM  # noqa: E402
from engine.params.sampling_params import SamplingParams  # noqa: E402
from engine.runner.load import lazy_model  # noqa: E402
from engine.runner.load.folder import FolderWeights  # noqa: E402
from engine.runner.load.loader import LoadedModel, load_model  # noqa: E402
from engine.runner.load.small_model import small_model  # noqa: E402
from engine.runner.load.weight_types import packed_modules, parameter_bytes  # noqa: E402
from tests.checkpoints.quantized import CHECKPOINTS, write_checkpoint  # noqa: E402
from tests.checkpoints.reference import PROMPT, greedy, mlx_lm_tokens  # noqa: E402
from tests.engine.parity.tiny_architectures import build  # noqa: E402
from tests.tiny_models import write_tokenizer  # noqa: E402

LOADED = [name for name, kind in CHECKPOINTS.items() if kind.refused is None]
RUN = [name for name in LOADED if CHECKPOINTS[name].runs]
REFUSED = [name for name, kind in CHECKPOINTS.items() if kind.refused is not None]
CPU = Device("cpu", "a CPU", 16 << 30)
GPU = Device("metal", "a GPU", 16 << 30)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each kind's folder, written once."""
    root = tmp_path_factory.mktemp("quantized")

    def folder(name: str) -> Path:
        path = root / re.sub(r"\W+", "_", name)
        return path if path.exists() else write_checkpoint(name, path)

    return folder


@pytest.fixture
def full_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with no room for unpacked weights."""
    monkeypatch.setattr("engine.runner.load.weight_types._EASY_SHARE", 0)


def write_hole(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> int:
    """A folder of bfloat16 weights that take no room on disk; gives the bytes that they would have."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return end


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny", **options))


def planned_and_loaded(folder: Path, device: Device) -> tuple[int, int]:
    """Bytes, without the check of what caches the architecture has."""
    resolved, args = ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny")
    config = read_model_config(resolved, args)
    reader = FolderWeights()
    model = reader.prepare(resolved, config, args, device).read(lambda *_: None)
    return reader.abstract(resolved, config, args, device).num_bytes, parameter_bytes(model)


@pytest.mark.parametrize("name", LOADED)
def test_a_plan_bills_what_is_loaded_on_a_cpu_and_on_a_gpu(name: str, folder_of: Callable[[str], Path]) -> None:
    for device in (CPU, GPU):
        planned, loaded = planned_and_loaded(folder_of(name), device)
        assert planned == pytest.approx(loaded, rel=0.01), device


@pytest.mark.parametrize("name", RUN)
def test_tokens_are_mlx_lms(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    plain = CHECKPOINTS[name].plain
    if plain:
        plain(tmp_path)
    assert greedy(load(folder_of(name)).model, 16) == mlx_lm_tokens(tmp_path if plain else folder_of(name), 16)


@pytest.mark.parametrize("name", [name for name in RUN if "bit" in name or "fp" in name or "FP4" in name])
def test_where_weights_stay_packed_tokens_are_the_same(
    name: str, folder_of: Callable[[str], Path], full_cpu: None, tmp_path: Path
) -> None:
    assert greedy(load(folder_of(name)).model, 8) == mlx_lm_tokens(folder_of(name), 8)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_in_one_line(name: str, folder_of: Callable[[str], Path]) -> None:
    words = re.escape(CHECKPOINTS[name].refused or "")
    with pytest.raises(ModelLoadError, match=words) as planned:
        engine.plan(str(folder_of(name)), overhead=0, max_model_len=256)
    with pytest.raises(ModelLoadError, match=words) as loaded:
        load_model(ResolvedModel("tiny", folder_of(name), "folder"), EngineArgs("tiny"), pytest.fail)
    for said in map(str, (planned.value, loaded.value)):
        assert "\n" not in said
        assert "fetch the model again" not in said
        assert re.search(r"convert|set |save |MLX has", said)


@pytest.mark.parametrize("name", [name for name in LOADED if name not in ("float32", "MLX, mixed bits")])
def test_without_the_files_a_plan_bills_what_the_configuration_tells(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two kinds aside: one whose configuration lies, and one whose unpacked layers it does not name."""
    for file in folder_of(name).glob("*.json"):
        shutil.copy(file, tmp_path)
    args = EngineArgs("tiny")
    sizes = []
    for folder in (folder_of(name), tmp_path):
        resolved = ResolvedModel("tiny", folder, "folder")
        sizes.append(FolderWeights().abstract(resolved, read_model_config(resolved, args), args, GPU).num_bytes)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize("name", ["AWQ gemm", "AWQ gemm, symmetric", "compressed-tensors pack-quantized, Kimi",
                                  "gpt-oss MXFP4", "FP8 blocks, DeepSeek", "FP8 one scale, Mistral 4",
                                  "FP8 blocks, MiMo", "MLX nvfp4, global scales", "MLX mxfp8"])  # fmt: skip
def test_unpacked_weights_are_near_those_that_were_packed(name: str, folder_of: Callable[[str], Path]) -> None:
    config = json.loads((folder_of(name) / "config.json").read_text())
    original = dict(tree_flatten(build(config).parameters()))
    for path, value in tree_flatten(load(folder_of(name)).model.parameters()):
        difference = mx.abs(value - original[path]).mean() / mx.abs(original[path]).mean()
        assert difference.item() < (0.25 if "FP8" not in name and "fp8" not in name else 0.05), path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["MLX 4-bit", "MLX mxfp4", "MLX nvfp4", "MLX mxfp8", "AWQ gemm", "BitNet, llama"])
def test_an_element_type_that_was_asked_for_is_that_of_all_floats(
    name: str, dtype: str, folder_of: Callable[[str], Path]
) -> None:
    loaded = load(folder_of(name), dtype=dtype)
    assert {value.dtype for _, value in tree_flatten(loaded.model.parameters())} == {getattr(mx, dtype)}
    assert len(greedy(loaded.model, 4)) == 4
    resolved, args = ResolvedModel("tiny", folder_of(name), "folder"), EngineArgs("tiny", dtype=dtype)
    planned = FolderWeights().abstract(resolved, read_model_config(resolved, args), args, CPU)
    assert planned.num_bytes == loaded.num_bytes


@pytest.mark.parametrize("name", ["MLX 4-bit", "MLX, mixed bits", "AWQ gemm", "gpt-oss MXFP4", "FP8 blocks, DeepSeek",
                                  "MLX nvfp4, global scales", "MLX nvfp4, activations", "BitNet"])  # fmt: skip
def test_a_small_model_is_quantized_as_the_large_one(name: str, folder_of: Callable[[str], Path]) -> None:
    resolved, args = ResolvedModel("tiny", folder_of(name), "folder"), EngineArgs("tiny")
    config = read_model_config(resolved, args)
    for device in (CPU, GPU):
        large = FolderWeights().abstract(resolved, config, args, device).model
        small = small_model(resolved, config, args, device)
        assert small is not None
        kinds = [{path: type(module) for path, module in model.named_modules()} for model in (large, small)]
        assert kinds[0] == kinds[1]
        shapes = [{n: (v.dtype, v.shape) for n, v in tree_flatten(m.parameters())} for m in (large, small)]
        assert shapes[0] == shapes[1]  # so small are these that nothing is left out
    assert len(greedy(small_model(resolved, config, args, CPU), 2)) == 2


def test_notes_tell_what_became_of_the_weights(folder_of: Callable[[str], Path]) -> None:
    ends = {
        "MLX, mixed bits": "float32 (3-bit, 6-bit, 8-bit weights unpacked exactly)",
        "gpt-oss MXFP4": "float32 (mxfp4 weights unpacked exactly)",
        "BitNet": "float32 (ternary weights unpacked exactly)",
        "FP8 blocks, DeepSeek": "float32 (dequantized from FP8)",
        "MLX nvfp4, activations": "nvfp4 weights unpacked exactly); activations are rounded as in a GPU's products",
    }
    for name, end in ends.items():
        assert load(folder_of(name)).notes[0].endswith(end)


@pytest.mark.parametrize(("device", "kept"), [(CPU, False), (GPU, True), (Device("cuda", "a GPU", 16 << 30), False)])
def test_ternary_weights_stay_packed_where_there_is_a_kernel_for_them(
    device: Device, kept: bool, folder_of: Callable[[str], Path]
) -> None:
    resolved, args = ResolvedModel("tiny", folder_of("BitNet"), "folder"), EngineArgs("tiny")
    prepared = FolderWeights().prepare(resolved, read_model_config(resolved, args), args, device)
    model = prepared.read(lambda *_: None)
    assert bool(packed_modules(model)) is kept
    assert ("kept packed" in prepared.describe(model)) is kept
    assert prepared.num_bytes == parameter_bytes(model)


def test_fp8_is_trusted_to_just_those_models_of_mlx_lm_that_unpack_or_keep_it() -> None:
    """A new mlx-lm may have more: then the tables in lazy_model.py grow."""
    readers, packers = set(), set()
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        path = Path(mlx_lm.models.__path__[0]) / f"{module.name}.py"
        source = path.read_text(encoding="utf-8")
        cleaned = source.partition("def sanitize")[2]
        if "from_fp8" in cleaned:
            readers.add(module.name)
        if re.search(r"fp8|FP8", source) and "view(mx.uint32)" in source and "from_fp8" not in cleaned:
            packers.add(module.name)
    assert set(lazy_model.FP8_READERS) == readers
    assert set(lazy_model.FP8_PACKERS) == packers


def test_other_tools_tensors_are_known_to_just_those_models_of_mlx_lm() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in Path(mlx_lm.models.__path__[0]).glob("*.py")}
    compressed = {name for name, text in sources.items() if "weight_packed" in text}
    readers = lazy_model.PACKED_READERS
    assert {name for title, names in readers.items() if title.startswith("compressed") for name in names} == compressed
    assert {name for name, text in sources.items() if "weight_scale_2" in text} == set(readers["ModelOpt NVFP4"])


@pytest.mark.parametrize(
    "name",
    ["compressed-tensors nvfp4-pack-quantized", "ModelOpt NVFP4, own file", "FP8 blocks, Qwen3", "GPTQ", "TorchAO"],
)
def test_what_cannot_be_read_is_refused_without_the_files_too(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for file in folder_of(name).glob("*.json"):
        shutil.copy(file, tmp_path)
    resolved, args = ResolvedModel("tiny", tmp_path, "folder"), EngineArgs("tiny")
    with pytest.raises(ModelLoadError, match="are not read by mlx-lm"):
        FolderWeights().abstract(resolved, read_model_config(resolved, args), args, GPU)


def test_a_file_that_ends_early_is_named(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folder_of("bfloat16"), tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: cut short, .* bytes; fetch"):
        load(tmp_path / "cut")
    file.write_bytes(b"\0" * 5)
    with pytest.raises(ModelLoadError, match="not a safetensors file"):
        load(tmp_path / "cut")


@pytest.mark.parametrize("name", ["AWQ gemm", "gpt-oss MXFP4", "BitNet", "MLX nvfp4, activations",
                                  "MLX nvfp4, global scales"])  # fmt: skip
def test_an_engine_gives_mlx_lms_tokens(name: str, tmp_path: Path, smollm2_gguf: Path) -> None:
    write_checkpoint(name, tmp_path)
    write_tokenizer(tmp_path, smollm2_gguf)
    greedily = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(str(tmp_path), max_model_len=256) as llm:
        reply = llm.generate({"prompt_token_ids": list(PROMPT)}, greedily)[0]
    assert list(reply.outputs[0].token_ids) == mlx_lm_tokens(tmp_path, 8)


def test_a_config_whose_quantization_was_undone_loads(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folder_of("bfloat16"), tmp_path / "undone")
    file = tmp_path / "undone" / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    assert greedy(load(tmp_path / "undone").model, 8) == mlx_lm_tokens(folder_of("bfloat16"), 8)


def test_settings_of_a_text_part_count(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folder_of("GPTQ"), tmp_path / "part")
    file = tmp_path / "part" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "text_config": {"quantization_config": config.pop("quantization_config")}}))
    with pytest.raises(ModelLoadError, match="GPTQ weights"):
        load(tmp_path / "part")


def test_a_plan_of_ten_thousand_tensors_takes_seconds_and_no_memory(tmp_path: Path) -> None:
    """256 experts in 13 layers, headers only: the data of the file is a hole."""
    layers, hidden, inner, experts = 13, 2048, 768, 256
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 6144,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": experts,
        "num_experts_per_tok": 8, "moe_intermediate_size": inner, "decoder_sparse_step": 1, "norm_topk_prob": True,
        "mlp_only_layers": [], "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "max_position_embeddings": 4096,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (151936, hidden), "model.norm.weight": (hidden,)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_norm": (128,),
            "self_attn.k_norm": (128,), "self_attn.q_proj": (4096, hidden), "self_attn.k_proj": (512, hidden),
            "self_attn.v_proj": (512, hidden), "self_attn.o_proj": (hidden, 4096), "mlp.gate": (experts, hidden),
        }.items():  # fmt: skip
            shapes[f"{layer}.{name}.weight"] = shape
        for expert in range(experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
                shapes[f"{layer}.mlp.experts.{expert}.{name}.weight"] = shape
    num_bytes = write_hole(tmp_path, config, shapes)
    before, begun = mx.get_active_memory(), time.monotonic()
    mx.reset_peak_memory()
    planned = engine.plan(str(tmp_path), overhead=0, device_memory="80GB", max_model_len=256)
    assert time.monotonic() - begun < 5
    assert mx.get_peak_memory() - before < 10_000_000
    assert planned.model_memory == num_bytes


def test_one_bit_is_unpacked_where_mlx_has_no_product_for_it(folder_of: Callable[[str], Path]) -> None:
    resolved, args = ResolvedModel("tiny", folder_of("MLX 1-bit"), "folder"), EngineArgs("tiny")
    config = read_model_config(resolved, args)
    kinds = {}
    for kind in ("cuda", "metal"):
        prepared = FolderWeights().prepare(resolved, config, args, Device(kind, "a GPU", 16 << 30))
        kinds[kind] = any("scales" in name for name, _ in tree_flatten(prepared.abstract().parameters()))
    assert kinds == {"cuda": False, "metal": True}
