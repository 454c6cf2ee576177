"""``--attention-backend``: its names, and which of them stands for each of vLLM's. No MLX."""

from engine.errors import ConfigError, UnsupportedOptionError

ATTENTION_BACKENDS = ("auto", "paged", "reference")
_NOT_PAGED = {
    "TORCH_SDPA": "reference",
    "FLEX_ATTENTION": "reference",
    "CPU_ATTN": "auto",
    "IPEX": "auto",
    "NO_ATTENTION": "auto",
    "CUSTOM": "auto",
}
"""vLLM's backends that stand for no kernel over pages: the framework's own attention, or whatever the device has."""
_KERNELS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "ROCM_", "XFORMERS", "PALLAS", "TREE_ATTN", "DUAL_CHUNK_FLASH")
"""Beginnings of the names of vLLM's backends that read pages by kernels."""


def attention_backend(name: str) -> str:
    """One of :data:`ATTENTION_BACKENDS`. Raises ConfigError for others, with ours in place of a name of vLLM's."""
    known = str(name).strip().lower()
    if known in ATTENTION_BACKENDS:
        return known
    names = ", ".join(ATTENTION_BACKENDS)
    instead = _instead(known.upper())
    if instead is None:
        said = f"--attention-backend {name}: must be one of {names}"
        raise ConfigError(said, flag="attention_backend", value=name, allowed=names)
    said = f"--attention-backend {name}: vLLM's name; this engine has {names}: take {instead}"
    raise UnsupportedOptionError(said, flag="attention_backend", value=name, allowed=names)


def _instead(name: str) -> str | None:
    """Which of ours does what vLLM's backend ``name`` is chosen for; None if vLLM has no such backend."""
    if "_MLA" in name or name.startswith("FLASHMLA"):  # latent attention, for which auto finds the path
        return "auto"
    return "paged" if name.startswith(_KERNELS) else _NOT_PAGED.get(name)
