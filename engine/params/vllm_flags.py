"""Flags of ``vllm serve`` that this engine lacks: refused with what to do instead, or accepted as no-ops."""

from collections.abc import Iterable

from engine.errors import UnsupportedOptionError


def _all(names: str, why: str) -> Iterable[tuple[str, str]]:
    return dict.fromkeys(names.split(), why).items()


_NOT_YET = "not in this version of vm-magic yet; leave it out"
_ONE_DEVICE = "vm-magic runs on one device; for several, %vllm_metal export gives the vLLM command"
REFUSED_FLAGS: dict[str, str] = dict(
    [
        *_all(
            "tensor-parallel-size pipeline-parallel-size data-parallel-size distributed-executor-backend", _ONE_DEVICE
        ),
        *_all("enable-expert-parallel nnodes node-rank master-addr decode-context-parallel-size", _ONE_DEVICE),
        *_all("speculative-config enable-lora lora-modules additional-config kv-transfer-config", _NOT_YET),
        ("quantization", "the checkpoint says how it is quantized; leave the flag out"),
        ("load-format", "the files say what they are (safetensors or GGUF); leave the flag out"),
        *_all("enforce-eager compilation-config", "steps are compiled only where that is faster; leave the flag out"),
        ("attention-config", "--attention-backend auto, paged or reference chooses; leave the flag out"),
        ("swap-space", "preempted requests are recomputed; leave the flag out"),
        ("cpu-offload-gb", "memory is shared on Apple hardware and planned elsewhere; lower --max-model-len instead"),
        ("num-gpu-blocks-override", "the memory plan decides; set --gpu-memory-utilization instead"),
        ("mamba-cache-mode", "states are kept at block boundaries if prefix caching is on: --enable-prefix-caching"),
        ("async-scheduling", "steps always overlap; leave the flag out"),
        ("scheduling-policy", "requests wait in order of priority, then of arrival; leave the flag out"),
        ("enable-chunked-prefill", "prefill is always chunked; --max-num-batched-tokens sets the size"),
        ("enable-sleep-mode", "%vllm_metal unload gives the memory back"),
        *_all("structured-outputs-config guided-decoding-backend", "grammars are llguidance's; leave the flag out"),
        ("max-logprobs", "at most 20 alternatives are reported for a token; leave the flag out"),
        ("uds", "only TCP on this machine is served; use --host and --port"),
        *_all("ssl-keyfile ssl-certfile", "put a TLS proxy in front, or use JupyterHub's"),
        *_all("middleware tool-parser-plugin reasoning-parser-plugin", "the server loads no code from outside"),
        ("allow-credentials", "credentials are the API key; leave the flag out"),
        *_all("api-server-count disable-frontend-multiprocessing", "all runs in this process; leave the flag out"),
        ("stream-interval", "every token is sent at once; leave the flag out"),
        ("enable-prompt-tokens-details", "usage always reports cached tokens; leave the flag out"),
        ("enable-per-request-metrics", "%vllm_metal explain tells a request's times, /metrics all of them together"),
        ("max-log-len", "the log holds no prompts (--enable-log-requests: path, status, time); leave the flag out"),
        *_all("disable-log-requests disable-uvicorn-access-log", "serve logs requests only with --enable-log-requests"),
        *_all("disable-log-stats log-config-file uvicorn-log-level", "%vllm_metal logs shows the log; leave it out"),
        ("response-role", "replies are the assistant's; leave the flag out"),
        ("download-dir", "the variable HF_HUB_CACHE names the folder of models"),
        ("hf-token", "the variable HF_TOKEN holds the token"),
        *_all("hf-overrides rope-scaling rope-theta", "--hf-config-path takes a folder with a config.json of your own"),
        *_all("tokenizer-revision code-revision", "--revision applies to all files of the model"),
        ("tokenizer-mode", "the tokenizer's files decide; leave the flag out"),
        *_all("runner task convert language-model-only", "this engine generates text only"),
    ]
)
"""Flags of ``vllm serve`` that are refused, with what to do instead."""

ACCEPTED_NO_OPS: dict[str, bool | tuple[str, ...]] = {
    **dict.fromkeys(("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size"), ("1",)),
    **dict.fromkeys(("decode-context-parallel-size", "nnodes", "api-server-count", "stream-interval"), ("1",)),
    **dict.fromkeys(("node-rank", "swap-space", "cpu-offload-gb"), ("0",)),
    **dict.fromkeys(("load-format", "tokenizer-mode"), ("auto",)),
    **dict.fromkeys(("runner", "task"), ("auto", "generate")),
    **dict.fromkeys(("enable-expert-parallel", "enforce-eager", "enable-lora", "enable-sleep-mode"), False),
    **dict.fromkeys(("enable-per-request-metrics", "allow-credentials"), False),
    **dict.fromkeys(("async-scheduling", "enable-chunked-prefill", "enable-prompt-tokens-details"), True),
    **dict.fromkeys(("disable-log-requests", "disable-uvicorn-access-log", "disable-frontend-multiprocessing"), True),
    "language-model-only": True,
    "distributed-executor-backend": ("uni",),
    "scheduling-policy": ("priority",),
    "max-logprobs": ("20",),
    "response-role": ("assistant",),
}
"""Accepted no-ops: values that ask for what this engine does in any case; True or False where the flag is a switch."""


def check_vllm_flag(name: str, value: object) -> None:
    """Raise UnsupportedOptionError unless ``name`` with ``value`` (a switch: True or False) is an accepted no-op."""
    accepted = ACCEPTED_NO_OPS.get(_plain(name), ())
    if isinstance(accepted, bool):
        if value is not accepted:
            raise refuse_flag(name if value else f"no-{name}")
    elif str(value) not in accepted:
        raise refuse_flag(name)


def refuse_flag(name: str) -> UnsupportedOptionError:
    """The error for a flag that vLLM has and this engine lacks."""
    name = _plain(name)
    why = REFUSED_FLAGS.get(name.removeprefix("no-"), "see %vllm_metal serve --help for the flags that are known")
    return UnsupportedOptionError(f"--{name} is not supported: {why}", flag=name)


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-")
