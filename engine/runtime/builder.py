"""From a resolved model to an engine that is ready: load, check, measure, plan. Runs on the engine's thread."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from engine.core.kv_cache_manager import KVCacheManager
from engine.core.scheduler import Scheduler
from engine.errors import ConfigError
from engine.memory.plan import MemoryPlan
from engine.memory.planner import pages_note, plan_memory
from engine.memory.step_cost import AdmissionControl, StepCost
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig
from engine.params.engine_args import EngineArgs
from engine.runner.backends import Backend
from engine.runner.device.devices import Device, DeviceKind, describe_device
from engine.runner.device.memory import FreeMemory, clear_cache
from engine.runner.kernels import expert_rows
from engine.runner.kernels.dialect import kernels_available
from engine.runner.kernels.few_rows import FewRowProducts
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.residual_layers import ResidualLayers
from engine.runner.kernels.routed_modules import RoutedExperts
from engine.runner.kernels.self_check import GPU_KERNELS
from engine.runner.kv.attention_grid import chunk_grid
from engine.runner.kv.attention_path import NO_KERNELS_ON_CPU, AttentionPath, describe
from engine.runner.kv.fused_blocks import FusedBlocks
from engine.runner.kv.gemma_attentions import GemmaAttentions
from engine.runner.kv.gemma_mlps import GemmaMLPs
from engine.runner.kv.kv_spec import ModelCaches, num_logits
from engine.runner.load.loader import WEIGHT_READERS, LoadedModel, load_model, plan_inputs
from engine.runner.load.small_model import small_model
from engine.runner.model_runner import ModelRunner
from engine.runner.paged_backend import PagedBackend
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampler_choice import choose_sampler
from engine.runner.warm_up import choose_backend, measure_step_cost
from engine.runtime.llm_engine import LLMEngine
from engine.runtime.load_clock import LoadClock
from engine.runtime.metrics import EngineMetrics
from engine.runtime.rehearsal import Check, meanwhile
from engine.text.tokens.detokenizer import Detokenizer
from engine.text.tokens.tokenizer import Tokenizer

logger = logging.getLogger("engine")

_WORTH_REHEARSING = 1 << 30
"""Bytes of weights that take longer to read than a small model's first steps take."""


class _Speedup(Protocol):
    """What computes parts of a model otherwise, where it is right."""

    def choose(self, progress: Callable[[int, int], None], /) -> object:
        """Try it; ``progress(done, total)``."""

    def install(self) -> None:
        """Use what was right."""

    def remove(self) -> None:
        """Leave the model as it was."""


Speedup = TypeVar("Speedup", bound=_Speedup)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, what it was built from, lines for the user, and what each part of the load took."""

    engine: LLMEngine
    config: ModelConfig
    plan: MemoryPlan
    notes: list[str]
    attention_paths: tuple[AttentionPath, ...]
    seconds: Mapping[str, float]


def build_engine(
    resolved: ResolvedModel,
    args: EngineArgs,
    tokenizer: Tokenizer,
    metrics: EngineMetrics,
    progress: Callable[[str, int, int], None] | None = None,
) -> BuiltEngine:
    """Load ``resolved`` and plan its memory; on failure everything is given back."""
    clock, device = LoadClock(), describe_device()

    def beside(config: ModelConfig, num_bytes: int) -> AbstractContextManager[None]:
        if device.kind != "cuda" or num_bytes < _WORTH_REHEARSING:
            return nullcontext()
        return meanwhile(partial(rehearse, resolved, config, args, device))

    loaded = load_model(resolved, args, progress, beside)
    clock.ended("weights")
    caches, vocab_size = ModelCaches(loaded.model), num_logits(loaded.model)
    progress = progress or _ignore
    with ExitStack() as undo:
        undo.callback(expert_rows.install(loaded.model, device.kind).undo)
        fused_layers, *faster = _speed_up(loaded.model, args, device, progress, undo)
        sampler, sampling_note = _choose_sampler(loaded.model, args, vocab_size)
        clock.ended("kernels")
        progress("warm-up", 0, 0)
        backend, note = _choose_backend(loaded.model, args, device, vocab_size)
        undo.callback(backend.close)
        clock.ended("warm-up")
        check_attention(args, backend.attention_paths)
        progress("warm-up", 0, 0)  # where a load that was given up ends
        plan, step_cost = _plan(loaded, caches, backend, args, device, vocab_size)
        clock.ended("step cost")
        kept = undo.pop_all()
    engine = _assemble(backend, plan, step_cost, args, device, tokenizer, metrics, vocab_size, sampler, kept.close)
    metrics.set_cache_config(
        block_size=plan.block_size,
        num_gpu_blocks=plan.num_blocks,
        gpu_memory_utilization=plan.fraction,
        enable_prefix_caching=args.enable_prefix_caching and backend.paged,
        cache_dtype=args.kv_cache_dtype,
    )
    paths = backend.attention_paths
    if not any(path.backend == "paged" for path in paths):
        fused_layers = None  # they compute nothing then
    pages, attention = pages_note(plan.groups, args.kv_cache_dtype), attention_note(args, device, paths)
    notes = [*loaded.notes, *filter(None, (note, pages, attention, fused_layers, *faster, sampling_note))]
    for line in notes:
        logger.info("%s", line)
    logger.info("Paged attention memory breakdown: %s", plan.log_line())
    return BuiltEngine(engine, loaded.config, plan, notes, paths, clock.seconds)


def _speed_up(
    model: Any, args: EngineArgs, device: Device, progress: Callable[[str, int, int], None], undo: ExitStack
) -> tuple[str | None, ...]:
    """Have layers and products computed in fewer or faster launches where that is right; a line for the user each.

    The first is of layers over pages, which compute nothing where there are none.
    """
    kernels = GPU_KERNELS if _own_kernels(args) and args.use_paged_attention else None
    over_pages = model, device.kind, kernels, args.block_size, args.kv_cache_dtype
    on_device, report = _device_of_kernels(args, device), partial(progress, "kernels")
    blocks = _use(FusedBlocks(*over_pages), report, undo)
    attentions = _use(GemmaAttentions(*over_pages), report, undo)
    mlps = _use(GemmaMLPs(model, on_device), report, undo)
    skip = blocks.products | attentions.products | mlps.products
    products = _use(FewRowProducts(model, on_device, skip=skip), report, undo)
    # After the products: what routes to experts is checked with the products that it will be computed with.
    experts = _use(RoutedExperts(model, on_device), report, undo)
    layers = _use(ResidualLayers(model, on_device), report, undo)
    return blocks.note or attentions.note, mlps.note, products.choices.note, experts.note, layers.note


def _use(found: Speedup, report: Callable[[int, int], None], undo: ExitStack) -> Speedup:
    """``found``, with what of it is right in use until ``undo``."""
    undo.callback(found.remove)
    found.choose(report)
    found.install()
    return found


def _choose_sampler(model: Any, args: EngineArgs, vocab_size: int) -> tuple[Sampler, str | None]:
    return choose_sampler(model, vocab_size) if _own_kernels(args) else (Sampler(), None)


def rehearse(resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device, check: Check) -> None:
    """Compile what a load's steps will need, on this thread, by a small model of the same kind; keep nothing else.

    ``check`` raises where the load is over.
    """
    weightless = WEIGHT_READERS[resolved.kind].abstract(resolved, config, args, device).model
    with collecting() as awaited:
        FewRowProducts(weightless, _device_of_kernels(args, device)).launch_kernels()
        RoutedExperts(weightless, _device_of_kernels(args, device)).launch_kernels()
        ResidualLayers(weightless, _device_of_kernels(args, device)).launch_kernels()
    compile_all(awaited)
    check()
    model = small_model(resolved, config, args, device)
    if model is None:
        return
    vocab_size = num_logits(model)
    with ExitStack() as undo:
        undo.callback(expert_rows.install(model, device.kind).undo)
        _speed_up(model, args, device, lambda *_progress: check(), undo)
        _choose_sampler(model, args, vocab_size)
        check()
        backend, _ = _choose_backend(model, args, device, vocab_size)
        undo.callback(backend.close)
        check()
        measure_step_cost(backend, vocab_size, device=device.kind, context_length=config.context_length)


def _choose_backend(model: Any, args: EngineArgs, device: Device, vocab_size: int) -> tuple[Backend, str | None]:
    return choose_backend(
        model,
        paged=args.use_paged_attention,
        block_size=args.block_size,
        kv_cache_dtype=args.kv_cache_dtype,
        device=device.kind,
        vocab_size=vocab_size,
        kernels=GPU_KERNELS if _own_kernels(args) else None,
        no_kernels=_no_kernels(args, device),
    )


def _device_of_kernels(args: EngineArgs, device: Device) -> DeviceKind:
    """The kind of device whose kernels may replace MLX's; a CPU has none."""
    return device.kind if _own_kernels(args) else "cpu"


def _own_kernels(args: EngineArgs) -> bool:
    """Whether anything but MLX's own operations is wanted, and runs here."""
    return args.attention_backend != "reference" and kernels_available()


def _no_kernels(args: EngineArgs, device: Device) -> str:
    """Why there are no kernels, for people."""
    if device.kind == "cpu":
        return NO_KERNELS_ON_CPU
    return "as asked for" if args.attention_backend == "reference" else ""


def check_attention(args: EngineArgs, paths: Sequence[AttentionPath]) -> None:
    """Raise ConfigError where kernels were asked for and serve no layer."""
    if args.attention_backend != "paged" or any(path.backend == "paged" for path in paths):
        return
    raise ConfigError(
        f"--attention-backend paged (or VLLM_METAL_ATTENTION_BACKEND): no layer's pages can be read by kernels: "
        f"{describe(paths)}; take auto or leave it out",
        flag="attention_backend",
        value="paged",
        allowed="auto, reference",
    )


def attention_note(args: EngineArgs, device: Device, paths: Sequence[AttentionPath]) -> str | None:
    """A line for the user on what reads pages; None where nobody expects kernels, or there are no pages."""
    backends = {path.backend for path in paths}
    expected = device.kind != "cpu" or args.attention_backend != "auto" or "paged" in backends
    return f"attention: {describe(paths)}" if expected and "contiguous" not in backends else None


def _plan(
    loaded: LoadedModel, caches: ModelCaches, backend: Backend, args: EngineArgs, device: Device, vocab_size: int
) -> tuple[MemoryPlan, StepCost]:
    step_cost = measure_step_cost(backend, vocab_size, device=device.kind, context_length=loaded.config.context_length)
    if isinstance(backend, PagedBackend):
        backend.release()
    clear_cache()
    inputs = plan_inputs(
        caches,
        loaded.config,
        args,
        device,
        paged=backend.paged,
        model_memory=loaded.num_bytes,
        overhead=step_cost,
    )
    return plan_memory(inputs), step_cost


def _assemble(
    backend: Backend,
    plan: MemoryPlan,
    step_cost: StepCost,
    args: EngineArgs,
    device: Device,
    tokenizer: Tokenizer,
    metrics: EngineMetrics,
    vocab_size: int,
    sampler: Sampler,
    close: Callable[[], None],
) -> LLMEngine:
    caching = args.enable_prefix_caching and backend.paged
    planned = [(spec, plan.num_blocks_of(spec)) for spec in plan.groups]
    kv = KVCacheManager.of_specs(planned, enable_caching=caching)
    free = FreeMemory(device)
    if isinstance(backend, PagedBackend):
        backend.free_memory = free
    per_token = sum(group.bytes_per_token for group in plan.groups)
    admission = AdmissionControl(step_cost, per_token, free)
    scheduler = Scheduler(
        kv,
        memory=admission,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=args.batched_tokens(device.chunk_size),
        chunk_grid=chunk_grid(device.kind),
    )
    max_blocks = [group.pool.num_blocks for group in kv.groups]
    runner = ModelRunner(backend, vocab_size, max_blocks=max_blocks, close=close, sampler=sampler)
    return LLMEngine(
        scheduler,
        runner,
        lambda prompt, params: Detokenizer(tokenizer, prompt, params),
        tokenizer.token_text,
        metrics,
        submit_first=device.kind != "cpu",
        admission=admission,
        max_model_len=plan.max_model_len,
    )


def _ignore(stage: str, done: int, total: int) -> None:
    """No progress wanted."""
