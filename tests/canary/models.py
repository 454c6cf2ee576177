"""Seams of mlx-lm and transformers: classes of models, caches, layers that are swapped, and what an import does."""

import resource
import subprocess
import sys
from importlib import import_module
from typing import Any

import mlx.core as mx

from tests.canary.probe import Seam, expect, named, takes

ATTENDING = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gemma4_text", "gpt_oss", "deepseek_v3")
SWAPPED = (
    ("llama", ("LlamaModel",), "fused_block"),
    ("qwen2", ("Qwen2Model",), "fused_block"),
    ("qwen3", ("Qwen3Model",), "fused_block"),
    ("gemma2", ("Attention", "MLP"), "capped_attention"),
    ("gemma3_text", ("MLP",), "gemma_mlps"),
    ("gemma4_text", ("MLP", "Attention", "RMSNormNoScale"), "gemma_attention"),
    ("qwen3_next", ("Qwen3NextGatedDeltaNet",), "delta_nets"),
    ("qwen3_5", ("GatedDeltaNet",), "delta_nets"),
    ("mamba2", ("Mamba2Block",), "ssm_layers"),
    ("falcon_h1", ("FalconH1Mixer",), "ssm_layers"),
    ("granitemoehybrid", ("GraniteMoeHybridMamba2Mixer",), "ssm_layers"),
    ("nemotron_h", ("NemotronHMamba2Mixer",), "ssm_layers"),
)
"""Modules, the classes in them that layers are recognised by or swapped for, and the file that does."""
TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 16,
}


def tiny_llama() -> Any:
    """A model without weights that matter."""
    utils = import_module("mlx_lm.utils")
    kind, arguments = utils._get_classes(dict(TINY))
    return kind(arguments.from_dict(dict(TINY)))


def classes_of_a_type() -> None:
    kind, arguments = import_module("mlx_lm.utils")._get_classes(dict(TINY))
    expect((kind.__name__, arguments.__name__) == ("Model", "ModelArgs"), f"it gives {kind} and {arguments}")
    expect(kind.__module__ == "mlx_lm.models.llama", f"its module is {kind.__module__}")


def attention_is_imported_by_name() -> None:
    base = import_module("mlx_lm.models.base")
    for name in ATTENDING:
        found = getattr(import_module(f"mlx_lm.models.{name}"), "scaled_dot_product_attention", None)
        expect(found is base.scaled_dot_product_attention, f"{name} attends by another function")


def trunk_before_head() -> None:
    model = tiny_llama()
    expect(hasattr(model, "model"), "llama's trunk is not `model`")
    hidden = model.model(mx.array([[1, 2]]))
    expect(hidden.shape == (1, 2, 8), f"the trunk gives {hidden.shape}")
    expect(model(mx.array([[1, 2]])).shape == (1, 2, 16), "the model does not give logits of every token")


class Watching:
    """Stands before a cache and notes what a model asks of it."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        return getattr(self._cache, name)


def what_models_ask_of_a_cache() -> None:
    model = tiny_llama()
    caches = [Watching(cache) for cache in import_module("mlx_lm.models.cache").make_prompt_cache(model)]
    model(mx.array([[1, 2, 3]]), cache=caches)
    known = {"offset", "update_and_fetch", "make_mask", "bits"}
    more = {name for cache in caches for name in cache.asked} - known
    expect(not more, f"models ask a cache for {', '.join(sorted(more))}")
    expect(caches[0].offset == 3, "a cache does not count its tokens in offset")


def kinds_of_caches() -> None:
    cache = import_module("mlx_lm.models.cache")
    expect(type(cache.make_prompt_cache(tiny_llama())[0]) is cache.KVCache, "llama's cache is no KVCache")
    window = cache.RotatingKVCache(max_size=8, keep=0)
    expect((window.max_size, window.keep) == (8, 0), "a window has neither max_size nor keep")
    states = cache.ArraysCache(size=2)
    states[0] = mx.zeros(1)
    expect(states[1] is None, "a state that was not set is not None")
    expect(len(cache.CacheList(window, states).caches) == 2, "a list of caches has no caches")


def gated_layers() -> None:
    layers = import_module("mlx_lm.models.switch_layers")
    experts = layers.SwitchGLU(8, 8, 2)
    for name in ("gate_proj", "up_proj", "down_proj"):
        expect(type(getattr(experts, name, None)) is layers.SwitchLinear, f"SwitchGLU has no SwitchLinear {name}")
    linear = layers.SwitchLinear(8, 4, 2, bias=False)
    expect(linear.weight.shape == (2, 4, 8), f"weights of experts are {linear.weight.shape}")


def import_lowers_the_limit_of_open_files() -> None:
    """Tells when our way around it is not needed any more, by finding it needed."""
    code = (
        "import resource; soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); before = (min(hard, 8192), hard); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, before); import mlx_lm.utils; "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE) != before)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    expect(hard < 8192 or done.stdout.strip() == "True", "an import leaves the limit alone: file_limits_kept can go")


def _seam(name: str, ours: str, probe: Any, package: str = "mlx-lm") -> Seam:
    return Seam(package, name, ours, probe)


MODELS = (
    _seam("array.__array__", "engine/runner/device/host.py", named("mlx.core", "array.__array__"), "mlx"),
    _seam(
        "streams of threads",
        "engine/runner/device/threads.py",
        named("mlx.core", "new_thread_unsafe_stream", "clear_streams"),
        "mlx",
    ),
    _seam("utils._get_classes", "engine/runner/load/model_classes.py", classes_of_a_type),
    _seam(
        "utils.load_model",
        "engine/runner/load/lazy_model.py",
        takes("mlx_lm.utils", "load_model", "model_path", "lazy", keywords=("model_config", "trust_remote_code")),
    ),
    _seam(
        "utils.get_total_parameters",
        "engine/runner/load/model_classes.py",
        named("mlx_lm.utils", "get_total_parameters"),
    ),
    _seam(
        "models.base.scaled_dot_product_attention",
        "engine/runner/kv/attention_patch.py",
        takes(
            "mlx_lm.models.base",
            "scaled_dot_product_attention",
            "queries",
            "keys",
            "values",
            "cache",
            "scale",
            "mask",
            "sinks",
        ),
    ),
    _seam("attention imported by name", "engine/runner/kv/attention_patch.py", attention_is_imported_by_name),
    _seam("trunk before head", "engine/runner/kv/attention_patch.py", trunk_before_head),
    _seam("what models ask of a cache", "engine/runner/kv/paged_cache.py", what_models_ask_of_a_cache),
    _seam("kinds of caches", "engine/runner/kv/kv_spec.py", kinds_of_caches),
    _seam(
        "masks asked of caches",
        "engine/runner/kv/paged_cache.py",
        takes("mlx_lm.models.base", "create_attention_mask", "h", "cache", "window_size", "return_array"),
    ),
    _seam("layers of experts", "engine/runner/kernels/expert_layers.py", gated_layers),
    _seam(
        "packed layers of experts and latents",
        "engine/runner/load/unpack.py",
        named("mlx_lm.models.mla", "MultiLinear", "QuantizedMultiLinear"),
    ),
    _seam(
        "BitNet's layers",
        "engine/runner/load/abstract_model.py",
        named("mlx_lm.models.bitlinear_layers", "BitLinear", "bitnet_quantize"),
    ),
    _seam(
        "rotary layers",
        "engine/runner/load/rope_layers.py",
        named(
            "mlx_lm.models.rope_utils",
            "DynamicNTKScalingRoPE",
            "SuScaledRoPE",
            "YarnRoPE",
            "Llama3RoPE",
            "ProportionalRoPE",
        ),
    ),
    *(
        _seam(f"{module}: {', '.join(names)}", f"engine/runner/kv/{ours}.py", named(f"mlx_lm.models.{module}", *names))
        for module, names, ours in SWAPPED
    ),
    _seam("swiglu", "engine/runner/kv/fused_block.py", named("mlx_lm.models.activations", "swiglu")),
    _seam("limit of open files", "engine/runner/device/devices.py", import_lowers_the_limit_of_open_files),
    _seam(
        "AutoTokenizer.from_pretrained",
        "engine/text/tokens/folder_tokenizer.py",
        named("transformers", "AutoTokenizer.from_pretrained"),
        "transformers",
    ),
)
