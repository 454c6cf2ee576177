"""``python -m tests.benchmarks.gpu.torch_rate FOLDER DEVICE``: transformers' continuous batching on the same weights.

Each line of standard input is a load, ``{"prompts": [[token, ...], ...], "num_tokens": N}``; its answer is one line,
``{"seconds": S, "tokens": N}``. Needs torch, which nothing else here does.
"""

import json
import sys
import time
from importlib import import_module


def main() -> None:
    """Answer until standard input ends."""
    folder, device = sys.argv[1:]
    torch, transformers = import_module("torch"), import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="paged|sdpa", device_map=device
    ).eval()
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        settings = transformers.GenerationConfig(
            max_new_tokens=load["num_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=True
        )
        begin = time.perf_counter()
        outputs = model.generate_batch(load["prompts"], generation_config=settings, persistent_manager=True)
        seconds = time.perf_counter() - begin
        count = sum(len(output.generated_tokens) for output in outputs.values())
        print(json.dumps({"seconds": seconds, "tokens": count}), flush=True)


if __name__ == "__main__":
    main()
