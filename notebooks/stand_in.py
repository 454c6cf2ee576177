"""Stand-ins for models that are too large to bring along, under their real names.

The weights are random and tiny, so replies are noise; the architecture, the file layout, the chat template's form and
everything that the engine does with them are those of the real model.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.models.resolve import resolve
from tests import tiny_models

GEMMA_TEMPLATE = """\
{{ bos_token }}{% if enable_thinking or tools %}<|turn>system
{% if enable_thinking %}<|think|>
{% endif %}{% for tool in tools or [] %}<|tool>{{ tool.function | tojson }}<tool|>{% endfor %}<turn|>
{% endif %}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""
QWEN_TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""
MODELS = {
    "unsloth/gemma-4-26b-a4b-it-UD-MLX-4bit": ("gemma4_text", GEMMA_TEMPLATE),
    "mlx-community/Qwen3.6-35B-A3B-4bit": ("qwen3_5_moe", QWEN_TEMPLATE),
}


def prepare() -> None:
    """Give this kernel a home folder of its own, whose Hugging Face cache holds the stand-ins."""
    vocabulary = resolve("smollm2").path
    home = Path(tempfile.mkdtemp(prefix="stand-in-"))
    hub = home / ".cache" / "huggingface" / "hub"
    for name, (architecture, template) in MODELS.items():
        folder = hub / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        tiny_models.write_weights(snapshot, tiny_models.family_config(architecture))
        tiny_models.write_tokenizer(snapshot, vocabulary)
        (snapshot / "chat_template.jinja").write_text(template)
    share = home / ".local" / "share"
    share.mkdir(parents=True)
    (share / "tool_chat_template_gemma4.jinja").write_text(GEMMA_TEMPLATE)
    os.environ |= {"HOME": str(home), "HF_HOME": str(hub.parent), "HF_HUB_CACHE": str(hub)}
