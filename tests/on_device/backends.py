"""The attention kernels as users meet them: chosen by a flag, told by a loaded model, checked and timed beside it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.batch.kernel_bench import NO_GPU, KernelBench, bench_kernels
from engine.format.text import aligned
from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from engine.runner.kv.attention_path import describe
from tests.on_device.small_models import SmallModel

MODEL = SmallModel("gemma3_text", 256, "bfloat16")
PROMPT = [number * 7 % 256 for number in range(700)]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def backends(*, without_gpu: bool = False) -> bool:
    """Whether all is right. ``without_gpu``: where there are no kernels, that they are not promised."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        MODEL.write(folder)
        right = [_loaded(folder, backend) for backend in ("auto", "reference")]
    common = bench_kernels()
    right.append(_shown(common))
    return all(right) and (without_gpu or NO_GPU not in common.result.notes)


def _loaded(folder: Path, backend: str) -> bool:
    """A model with one backend, and the kernels checked beside it, between two of its replies."""
    with LLM(str(folder), attention_backend=backend, max_model_len=2048, gpu_memory_utilization=0.3) as llm:
        print(f"{backend}: {describe(llm.attention_paths)}", flush=True)

        def reply() -> list[int]:
            return llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0].token_ids

        return _unchanged(reply, llm.bench_kernels()) and (backend == "auto" or not _by_kernels(llm))


def _unchanged(reply: Callable[[], list[int]], bench: KernelBench) -> bool:
    before, right = reply(), _shown(bench)
    if reply() == before:
        return right
    print("WRONG: the model's reply is another after the check", flush=True)
    return False


def _by_kernels(llm: LLM) -> bool:
    return any(path.backend == "paged" for path in llm.attention_paths)


def _shown(bench: KernelBench) -> bool:
    """Whether every row is right; prints them all."""
    rows: list[tuple[str, ...]] = [("kernel", "shape", "right", "us", "floor", "of floor")]
    for row in bench.run():
        times = (row.microseconds, row.floor_microseconds)
        share = "" if row.share is None else f"{row.share:.0%}"
        rows.append(
            (row.kernel, row.shape, row.problem or "yes", *("" if t is None else f"{t:.1f}" for t in times), share)
        )
    lines = [*aligned(rows), *bench.result.notes, *(f"{name}: {fact}" for name, fact in bench.result.facts.items())]
    print("\n".join(lines), flush=True)
    return not any(row.problem for row in bench.result.rows)
