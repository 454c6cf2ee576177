"""What a seed gives on this device: the same tokens again, and how often a batch gives others by rounding."""

import tempfile
from pathlib import Path

import numpy as np

from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from tests.on_device.small_models import VOCAB, SmallModel

COUNT = 64
NUM_TOKENS = 24


def seeds() -> bool:
    """Whether requests alone, their prompts computed anew, repeat bit for bit in float32 and bfloat16.

    Prints how many of them another batch changes: a draw within rounding of a boundary may fall on either side.
    """
    right = True
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as temporary:
            SmallModel("qwen3", 64, dtype).write(Path(temporary))
            with LLM(temporary, max_model_len=1024, enable_prefix_caching=False) as llm:
                right = _repeats(llm, dtype) and right
    return right


def _repeats(llm: LLM, dtype: str) -> bool:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, VOCAB, int(length)).tolist() for length in rng.integers(2, 400, COUNT)]
    params = [
        SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=NUM_TOKENS, ignore_eos=True)
        for i in range(COUNT)
    ]  # fmt: skip

    def alone() -> list[list[int]]:
        pairs = zip(prompts, params, strict=True)
        return [llm.generate([prompt], own)[0].outputs[0].token_ids for prompt, own in pairs]

    first, second = alone(), alone()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    together = [output.outputs[0].token_ids for output in outputs]
    differ = sum(one != other for one, other in zip(first, together, strict=True))
    repeated = first == second
    said = "repeat bit for bit" if repeated else "do NOT repeat"
    print(f"seeds: {dtype}: {COUNT} x {NUM_TOKENS} tokens {said} alone; in one batch {differ} differ", flush=True)
    return repeated
