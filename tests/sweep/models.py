"""Every model file of the installed mlx-lm, tiny and random, run by the engine and compared with mlx-lm itself."""

import contextlib
import importlib
import io
import pkgutil
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import mlx.core as mx
import mlx_lm.models
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from engine.runner.backends import Backend
from engine.runner.paged_backend import PagedBackend
from tests.engine.parity.bare_engine import BareEngine, greedy
from tests.engine.parity.tiny_architectures import build
from tests.sweep.configurations import VOCAB, WINDOW, tiny_config

NUM_TOKENS = 3
_PROMPTS = [np.random.default_rng(0).integers(10, VOCAB, size).tolist() for size in (3, WINDOW + 9)]
_MOST_PARAMETERS = 20_000_000

How = Literal["paged", "contiguous", "not runnable"]


@dataclass(frozen=True, slots=True)
class Row:
    """One model file: the memory its layers need, how the engine runs it, and why not better or by which calls.

    ``equal``: a short batched run gave the tokens of mlx-lm's own generation.
    """

    name: str
    groups: str
    how: How
    note: str
    equal: bool = True


def model_files() -> list[str]:
    """Names of the files of ``mlx_lm.models`` that hold a model."""
    return [name for name in _files() if not _is_helper(name)]


def helper_files() -> list[str]:
    """Names of the other files."""
    return [name for name in _files() if _is_helper(name)]


def sweep(names: Sequence[str]) -> list[Row]:
    """A row for each model file of ``names``."""
    return [run(name) for name in names]


def run(name: str) -> Row:
    """Build the tiny model of ``name``, run it batched, and compare its tokens with mlx-lm's."""
    try:
        _import(name)
        model = build(tiny_config(name), limit=_MOST_PARAMETERS)
        expected = [greedy(model, prompt, NUM_TOKENS) for prompt in _PROMPTS]
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a model file may object in any way: that is the row)
        return Row(name, "", "not runnable", _reason(error))
    engine = BareEngine(model)
    try:
        found = [request.output_token_ids for request in engine.generate(_PROMPTS, NUM_TOKENS)]
        if found != expected:  # some caches of mlx-lm give other tokens where a prompt is cut otherwise
            expected = [greedy_from_one_call(model, prompt, NUM_TOKENS) for prompt in _PROMPTS]
        backend = engine.backend
        if isinstance(backend, PagedBackend):
            return Row(name, groups(model, backend), "paged", backend.calls, found == expected)
        return Row(name, groups(model, backend), "contiguous", _why(engine.note), found == expected)
    finally:
        engine.backend.close()
        mx.clear_cache()


def greedy_from_one_call(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """mlx-lm's greedy tokens with the whole prompt in one call; its ``generate_step`` cuts off the last token."""
    caches, tokens = make_prompt_cache(model), list(prompt)
    for _ in range(num_tokens):
        logits = model(mx.array([tokens[-len(prompt) :] if len(tokens) == len(prompt) else tokens[-1:]]), cache=caches)
        tokens.append(int(logits[0, -1].argmax().item()))
    return tokens[len(prompt) :]


def groups(model: Any, backend: Backend) -> str:
    """What the layers keep, in the words of the memory plan, or mlx-lm's where nothing is paged."""
    caches = make_prompt_cache(model)
    if not isinstance(backend, PagedBackend):
        return ", ".join(f"{kind}" for kind in dict.fromkeys(type(cache).__name__ for cache in caches))
    kinds = Counter(leaf.spec.kind for leaves in backend.groups for leaf in leaves)
    attending = sum("self_attn" in layer for layer in model.layers)
    return ", ".join([*kinds, *(["shared"] if attending > len(caches) else [])])


def _files() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__))


@cache
def _is_helper(name: str) -> bool:
    """Whether a file has no model; one that cannot even be imported may have."""
    try:
        module = _import(name)
    except (Exception, SystemExit):  # noqa: BLE001  (that will be its row)
        return False
    return not (hasattr(module, "Model") and hasattr(module, "ModelArgs"))


def _import(name: str) -> Any:
    """A model file as a module; what it prints before it gives up becomes the reason."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return importlib.import_module(f"mlx_lm.models.{name}")
    except SystemExit:
        raise ImportError(printed.getvalue()) from None


def _why(note: str | None) -> str:
    """The reason in the engine's line, without measured numbers."""
    text = (note or "").removeprefix("contiguous KV caches for this architecture, no prefix cache ")
    reason, alone, batch = re.sub(r"differ by [\w.+]+", "differ", text).partition("; a call for each request")
    return reason.removeprefix("(").removesuffix(")") + alone + batch


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]
