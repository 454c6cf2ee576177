"""The environment variables that are read, and what is odd about those that are set here."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.checkup.findings import Finding
from engine.errors import ConfigError

AREA = "environment"
ENVIRONMENT = {
    "VLLM_METAL_MEMORY_FRACTION": "as `--gpu-memory-utilization`: `auto` (0.90) or a number in (0, 1]",
    "VLLM_METAL_USE_PAGED_ATTENTION": "`0` takes mlx-lm's own contiguous caches instead of pages",
    "VLLM_METAL_ATTENTION_BACKEND": "as `--attention-backend`: `auto`, `paged` or `reference`",
    "VLLM_API_KEY": "the port's key without `--api-key`, and the key that `connect` sends (else `OPENAI_API_KEY`)",
    "HF_HOME": "folder of Hugging Face files; models are in its `hub`",
    "HF_HUB_CACHE": "folder of Hugging Face models",
    "HF_HUB_OFFLINE": "`1`: no network, only models that are here",
    "TRANSFORMERS_OFFLINE": "as `HF_HUB_OFFLINE`",
    "HF_DATASETS_OFFLINE": "as `HF_HUB_OFFLINE`",
    "XDG_CACHE_HOME": "where `smollm2` and, without `HF_HOME`, Hugging Face files are kept (`~/.cache`)",
    "XDG_RUNTIME_DIR": "where kernels tell each other how much memory they plan (else beside `smollm2`)",
    "JPY_SESSION_NAME": "set by Jupyter: the notebook's name, which its other notebooks are told",
    "CUDA_VISIBLE_DEVICES": "the GPUs that `--device cuda:N` and `replicas=` count; `--device` sets it to its one",
    "XDG_CONFIG_HOME": "where the `llm` tool keeps its settings (`~/.config`)",
    "LLM_USER_PATH": "the `llm` tool's folder, where that is somewhere else",
    "OPENBLAS_DIR": "folder of an OpenBLAS to use on a Linux CPU before the system's",
    "OPENBLAS_NUM_THREADS": "its threads; not set: as many as the container's quota of processors allows",
    "JUPYTERHUB_SERVICE_PREFIX": "set by JupyterHub: `serve` shows the address through its proxy too",
    "JUPYTERHUB_PUBLIC_URL": "set by JupyterHub: the address that others see, whose name the port then serves",
    "JUPYTERHUB_HOST": "set by JupyterHub where users have subdomains: its address",
    "JUPYTERHUB_USER": "set by JupyterHub: whose subdomain that is",
}
"""Every variable that this package reads, and what it means."""
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "OPENBLAS_DIR")
_PLAIN = re.compile(r"[0-9][0-9.,]{0,15}|auto|paged|reference|true|false|yes|no|on|off", re.IGNORECASE)
"""Values that can be shown to anybody."""
_LOOPBACK = ("127.0.0.1", "localhost")


def check_variables(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Which variables are set, and which of their values make no sense."""
    known = {name: env[name] for name in ENVIRONMENT if env.get(name)}
    shown = [f"{name}={value}" if _PLAIN.fullmatch(value) else f"{name} (set)" for name, value in known.items()]
    yield Finding(AREA, "variables", ", ".join(shown) or "none that are read are set")
    for name in _FOLDERS:
        path = os.path.expandvars(os.path.expanduser(known.get(name, "")))
        if not path or Path(path).is_dir():
            continue
        if Path(path).exists():
            fix = f"unset {name}, or name a folder"
            yield Finding(AREA, name, f"{path} is not a folder", "problem", fix, private=(path,))
        else:
            yield Finding(AREA, name, f"{path} is not there yet", private=(path,))
    yield from _engine_variables(known)


def _engine_variables(known: Mapping[str, str]) -> Iterator[Finding]:
    """What a load would say of the engine's own variables."""
    from engine.params.engine_args import EngineArgs

    try:
        EngineArgs.from_options("smollm2", {})
    except ConfigError as error:
        wrong = next((name for name in known if name.startswith("VLLM_METAL_") and name in str(error)), "a variable")
        private = tuple(known.values())
        yield Finding(AREA, wrong, str(error), "problem", f"unset {wrong}, or give it another value", private=private)


def check_proxies(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether clients started in this environment would send what is for this machine to a proxy."""
    lower = {name.lower(): value for name, value in env.items() if value}
    proxies = [name.upper() for name in ("http_proxy", "all_proxy") if name in lower]
    if not proxies:
        yield Finding("port", "proxies", "none")
        return
    spared = [name.strip().lstrip("*.") for name in lower.get("no_proxy", "").split(",")]
    caught = [] if "*" in lower.get("no_proxy", "").split(",") else [host for host in _LOOPBACK if host not in spared]
    said = " and ".join(proxies)
    if not caught:
        yield Finding("port", "proxies", f"{said} set, not for this machine (NO_PROXY)")
        return
    names = ",".join(_LOOPBACK)
    text = f"{said} set: clients here may look for {' and '.join(caught)} at the proxy, and not find the port"
    yield Finding(
        "port", "proxies", text, "warning", f"set NO_PROXY={names} (and no_proxy) for clients, or where Jupyter starts"
    )
