"""What a user is told about a model's architecture when it is loaded, on a whole engine."""

import json
import shutil
from pathlib import Path
from typing import Any

from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from tests.sweep.configurations import tiny_config
from tests.tiny_models import VOCAB_SIZE

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
OPTIONS = {"max_model_len": 256, "gpu_memory_utilization": 0.2}


def test_an_architecture_that_cannot_page_says_so_and_answers_all_the_same(tiny_model_dir: Any) -> None:
    folder = tiny_model_dir("plamo3", **{**tiny_config("plamo3"), "vocab_size": VOCAB_SIZE})
    with LLM(str(folder), **OPTIONS) as llm:
        (line,) = [note for note in llm.notes if "contiguous" in note]
        assert line.startswith("contiguous KV caches for this architecture, no prefix cache (")
        prompts = [[5, 6, 7], [8, 9]]
        together = llm.generate(prompts, GREEDY, use_tqdm=False)
        alone = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
        assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_a_checkpoint_that_also_sees_serves_its_text_part_and_says_so(tiny_model_dir: Any, tmp_path: Path) -> None:
    import mlx.core as mx

    plain = tiny_model_dir("gemma3_text")
    folder = Path(shutil.copytree(plain, tmp_path / "gemma3"))
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "gemma3", "vocab_size": text["vocab_size"], "text_config": text, "eos_token_id": 2,
              "vision_config": {"hidden_size": 4}, "torch_dtype": "float32"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"language_model.{key}": value for key, value in mx.load(str(plain / "model.safetensors")).items()}
    weights["vision_tower.vision_model.post_layernorm.weight"] = mx.ones((4,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    prompt = list(range(40, 90))
    with LLM(str(folder), **OPTIONS) as seeing, LLM(str(plain), **OPTIONS) as reading:
        assert "only the text part is loaded, not vision: this engine serves text" in seeing.notes
        assert not any("text part" in note for note in reading.notes)
        outputs = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for llm in (seeing, reading)]
    assert outputs[0] == outputs[1]
