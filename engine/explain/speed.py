"""Why is it slow: what share of the device's best the steps reached, what took the rest, and what would help.

Numbers come from the engine's tally (:class:`engine.outputs.StepTotals`) and a device that was measured; reasons from
what the engine knows already. Nothing here computes on a device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.memory.cache_spec import MLAAttentionSpec, SlidingWindowSpec, StateSpec
from engine.memory.plan import MemoryPlan
from engine.memory.roofline import DeviceSpeed, ModelWork, Reached, decode_reached, prompt_reached
from engine.outputs import StepTotals
from engine.params.sizes import size_text
from engine.runner.kv.attention_path import NO_KERNELS_ON_CPU, AttentionPath

GOOD = 0.7
"""Share of the device's best from which on nothing of the device is called slow."""
_FEW = 8
"""Requests a step up to which a GPU's step takes hardly longer with more."""
_BUSY = 1.5
"""Threads a processor from which on a machine is busy with more than this engine."""
_WORTH = 0.05
"""Share of the time from which on a reason is worth a line."""


@dataclass(frozen=True, slots=True)
class Reason:
    """What took time, what would help (may be empty), and how many seconds of it; None where that is not known."""

    what: str
    help: str = ""
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.what}; what helps: {self.help}" if self.help else self.what


@dataclass(frozen=True, slots=True)
class SpeedFacts:
    """What of a loaded engine its speed follows from.

    ``blas_note``: the line on the choice of BLAS on a CPU. ``load``: threads that want to run on this machine now, for
    each of its processors.
    """

    plan: MemoryPlan
    work: ModelWork
    attention_paths: tuple[AttentionPath, ...]
    on_cpu: bool
    attention_backend: str = "auto"
    blas_note: str = ""
    sampling_note: str = ""
    load: float = 0.0

    @property
    def paged(self) -> bool:
        """Whether there are pages."""
        return all(path.backend != "contiguous" for path in self.attention_paths)


@dataclass(frozen=True, slots=True)
class Speed:
    """How near steps came to the device's best, in lines; ``reasons`` with the costliest first.

    ``missing`` says why there are no shares, if there are none.
    """

    decode: Reached | None = None
    prompt: Reached | None = None
    lines: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()
    estimates: tuple[str, ...] = ()
    missing: str = ""


def device_reasons(facts: SpeedFacts, decode: Reached | None, device: DeviceSpeed | None) -> Iterator[Reason]:
    """What of the machine and the model's form keeps steps from being faster, whatever the request."""
    if decode is None or decode.share < GOOD:
        yield from _shortfalls(facts, decode, device)
    if decode is not None:
        yield from _byte_reasons(facts, decode)


def _shortfalls(facts: SpeedFacts, decode: Reached | None, device: DeviceSpeed | None) -> Iterator[Reason]:
    """Why steps read more slowly than the device could."""
    if "without OpenBLAS" in facts.blas_note:
        yield Reason("MLX computes with its own BLAS", "pip install scipy-openblas32, and restart the kernel")
    if facts.on_cpu and facts.load > _BUSY:
        yield Reason(
            f"{facts.load:.1f} threads want each processor of this machine now", "end other programs and kernels"
        )
    yield from _attention_reasons(facts)
    if facts.sampling_note:
        yield Reason(facts.sampling_note)
    if not facts.on_cpu and decode is not None and decode.rows < _FEW and 2 * decode.weight_bytes >= decode.num_bytes:
        requests = f"{decode.rows:.1f} requests" if decode.rows >= 1.05 else "one request"
        yield Reason(
            f"a step reads all weights and starts all kernels for {requests} as it would for more",
            "requests in one batch share that (llm.map, several cells with --detach)",
        )
    row = 0.0 if device is None else device.row_bytes_per_second
    if device is not None and decode is not None and 0 < row < GOOD * device.bytes_per_second and decode.rows < 2:
        share = row / device.bytes_per_second
        yield Reason(
            f"a product of one row reads {rate_text(row)} on this processor, {share:.0%} of what its memory gives",
            "requests in one batch share the reading (llm.map, several cells with --detach)",
            (decode.seconds - decode.floor_seconds) * decode.steps,
        )


def _attention_reasons(facts: SpeedFacts) -> Iterator[Reason]:
    """Layers that no kernel serves, where there could be one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for path in facts.attention_paths:
        if path.backend != "paged" and path.why != NO_KERNELS_ON_CPU:
            alike.setdefault((path.backend, path.why), []).append(str(path))
    for (backend, why), layers in alike.items():
        if backend == "contiguous":
            help_text = "leave out VLLM_METAL_USE_PAGED_ATTENTION=0" if not why else ""
            yield Reason(f"no pages: mlx-lm's contiguous caches{f' ({why})' if why else ''}", help_text)
        elif not facts.on_cpu:
            asked = facts.attention_backend == "reference"
            yield Reason(
                f"attention of {', '.join(layers)} by MLX's own operations{f' ({why})' if why else ''}",
                "--attention-backend auto takes kernels that read pages in place" if asked else "",
            )


def _byte_reasons(facts: SpeedFacts, decode: Reached) -> Iterator[Reason]:
    """What fewer bytes would give: packed weights, packed pages."""
    spent = decode.seconds * decode.steps
    weights, cache = (part / decode.num_bytes for part in (decode.weight_bytes, decode.cache_bytes))
    if not facts.work.packed and weights >= 0.5:
        size = {"float32": "an eighth", "float64": "a sixteenth"}.get(facts.work.dtype, "a quarter")
        what = f"the weights are {facts.work.dtype}, {size_text(decode.weight_bytes)} a step"
        if facts.on_cpu:
            yield Reason(what, "a smaller model; packed ones take less memory, but no less time on a CPU")
        else:
            yield Reason(what, f"a 4-bit model moves about {size}", 0.75 * weights * spent)
    if cache >= 0.25 and facts.paged and facts.plan.inputs.kv_cache_dtype == "auto" and not facts.on_cpu:
        yield Reason(
            f"the KV cache is {cache:.0%} of what a step reads", "load with --kv-cache-dtype int8", 0.5 * cache * spent
        )


def step_reasons(totals: StepTotals, decode: Reached | None, elapsed: float | None = None) -> Iterator[Reason]:
    """What the engine did beside decoding: prompts of others, and (``elapsed`` seconds in all) work between steps."""
    whole = totals.decode_seconds + totals.prompt_seconds
    if totals.mixed:
        usual = decode.seconds if decode is not None else 0.0
        lost = max(0.0, totals.mixed_seconds - totals.mixed * usual)
        steps = totals.decodes + totals.prompts
        if lost >= _WORTH * (elapsed or whole):
            yield Reason(
                f"{totals.mixed:,} of {steps:,} steps also computed prompts of other requests, "
                f"{lost / (elapsed or whole):.0%} of the time",
                "a smaller --max-num-batched-tokens makes each of them shorter",
                lost,
            )
    between = 0.0 if elapsed is None else elapsed - whole
    if elapsed and between >= 2 * _WORTH * elapsed:
        yield Reason(
            f"{between / elapsed:.0%} of the time lay between steps: scheduling, tokens to text, other Python code",
            "cells that compute meanwhile share the interpreter with the engine",
            between,
        )


def decode_line(reached: Reached, device: DeviceSpeed, per_second: float | None = None) -> str:
    """The decodes of a request (``per_second`` of its tokens) in one sentence."""
    parts = f"weights {size_text(reached.weight_bytes)}, KV cache {size_text(reached.cache_bytes)}"
    own = "" if per_second is None else f"{per_second:,.1f} tokens/s; "
    rows = f" of {reached.rows:.1f}".removesuffix(".0") + " requests" if reached.rows >= 1.05 else ""
    return (
        f"decode: {own}a step{rows} moved {size_text(reached.num_bytes)} ({parts}) in {ms(reached.seconds)}: "
        f"{rate_text(reached.bytes_per_second)}, {share_text(reached.share)} of the "
        f"{rate_text(device.bytes_per_second)} measured on this device"
    )


def prompt_line(reached: Reached, device: DeviceSpeed, num_tokens: int) -> str:
    """The steps that computed a prompt, in one sentence."""
    took = f"{reached.steps:,} step{'s' * (reached.steps != 1)} with {num_tokens:,} "
    took += f"token{'s' * (num_tokens != 1)} took "
    took += ms(reached.seconds * reached.steps)
    if reached.by_memory:
        floor = ms(reached.floor_seconds * reached.steps)
        return f"prefill: {took}; reading the weights takes {floor} of it, {share_text(reached.share)}"
    return (
        f"prefill: {took}: {flops_text(reached.flops_per_second)}, {share_text(reached.share)} of the "
        f"{flops_text(device.flops_per_second)} measured on this device for products of {device.dtype}"
    )


def estimates(facts: SpeedFacts) -> Iterator[str]:
    """What of the bytes is estimated, or not in them."""
    work, groups = facts.work, facts.plan.groups
    if work.num_experts and work.chosen:
        yield (
            f"of the experts' weights, those that {work.chosen} of {work.num_experts} a token would take if they were "
            "chosen evenly"
        )
    elif work.num_experts:
        yield "all experts' weights: the model does not say how many a token takes"
    windows = [group.window for group in groups if isinstance(group, SlidingWindowSpec)]
    if windows:
        yield f"sliding layers read their window ({', '.join(f'{window:,}' for window in sorted(windows))} tokens)"
    if any(isinstance(group, MLAAttentionSpec) for group in groups):
        yield "latent attention reads its latents once for all heads"
    if any(isinstance(group, StateSpec) for group in groups):
        yield "states are read and written once a token"
    if shared := facts.plan.inputs.shared_layers:
        yield f"what {len(shared)} layers read again of other layers' pages is not counted"


def running_speed(totals: StepTotals, facts: SpeedFacts, device: DeviceSpeed) -> Speed:
    """Of all requests together, over the steps in ``totals``."""
    groups = facts.plan.groups
    decode = decode_reached(totals, facts.work, groups, device)
    prompt = prompt_reached(totals, facts.work, groups, device)
    lines = [] if decode is None else [decode_line(decode, device)]
    if prompt is not None:
        lines.append(prompt_line(prompt, device, totals.prompt_tokens))
    reasons = [*device_reasons(facts, decode, device), *step_reasons(totals, decode)]
    return Speed(decode, prompt, tuple(lines), tuple(costliest_first(reasons)), tuple(estimates(facts)))


def costliest_first(reasons: Sequence[Reason]) -> list[Reason]:
    """Those whose seconds are known by size, then the others as they came."""
    return sorted(reasons, key=lambda reason: -1.0 if reason.seconds is None else reason.seconds, reverse=True)


def rate_text(bytes_per_second: float) -> str:
    """``31.2 GB/s``, ``3.98 TB/s``."""
    return _scaled(bytes_per_second, "B/s")


def flops_text(flops_per_second: float) -> str:
    """``345 GFLOP/s``, ``690 TFLOP/s``."""
    return _scaled(flops_per_second, "FLOP/s")


def _scaled(value: float, unit: str) -> str:
    """Three digits."""
    scale, letter = next((one for one in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if value >= one[0]), (1e6, "M"))
    return f"{value / scale:.3g} {letter}{unit}"


def share_text(share: float) -> str:
    """``38%``; beyond all of it, that caches help."""
    return f"{share:.0%}" if share <= 1.05 else f"{share:.0%} (caches on the chip hold part of it)"


def ms(seconds: float) -> str:
    """``32 ms``, ``1.25 s``."""
    if seconds < 1e-5:
        return "0 ms"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
