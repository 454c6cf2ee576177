"""What greedy replies must say: each question asked alone beforehand, and mlx-lm's own tokens beside the port's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.load.questions import CHAT, COMPLETIONS, Question
from tests.load.replies import Said, whole

MARGIN = 1e-3
"""Nats by which each token must be likelier than the next: below it, rounding alone may decide."""


@dataclass(frozen=True)
class Expected:
    """Replies by :attr:`Question.said`. ``dropped`` could not be foretold: a near tie, or the text ends by itself."""

    said: dict[str, Said]
    num_proved: int
    """How many of them mlx-lm says too, token by token."""
    dropped: tuple[str, ...] = ()

    def askable(self, questions: Sequence[Question]) -> list[Question]:
        """Those of ``questions`` whose replies can be judged."""
        return [question for question in questions if question.said is None or question.said in self.said]


def ask_alone(base_url: str, headers: dict[str, str], questions: Sequence[Question], model: Path) -> Expected:
    """Ask one after the other, unbatched. Raises AssertionError where the port and mlx-lm differ already."""
    said: dict[str, Said] = {}
    dropped: list[str] = []
    num_proved = 0
    with httpx.Client(base_url=base_url, headers=headers, timeout=120, trust_env=False) as http:
        for question in questions:
            name = question.said
            if name is None or name in said or name in dropped:
                continue
            plain = question.path in (CHAT, COMPLETIONS) and set(question.body) <= {
                "messages", "prompt", "max_tokens", "temperature",
            }  # fmt: skip
            response = http.post(question.path, json={**question.body, **({"return_token_ids": True} if plain else {})})
            assert response.status_code == 200, f"{question.name}: {response.text}"
            data = response.json()
            reply = whole(question.path, data)
            if plain:
                wanted = _oracle(model, _prompt_of(data), int(question.body["max_tokens"]))
                if wanted is None:
                    dropped.append(name)
                    continue
                assert list(reply.token_ids) == wanted, f"{question.name}: {reply.token_ids}, mlx-lm says {wanted}"
                num_proved += 1
            said[name] = reply
    return Expected(said, num_proved, tuple(dropped))


def _prompt_of(data: dict[str, Any]) -> list[int]:
    return list(data.get("prompt_token_ids") or data["choices"][0]["prompt_token_ids"])


def _oracle(model: Path, prompt: Sequence[int], num_tokens: int) -> list[int] | None:
    """mlx-lm's greedy tokens; None where one of them is a near tie or the end."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from tests.engine.parity.oracle import oracle_model

    tokens = []
    for token, logprobs in generate_step(mx.array(list(prompt)), oracle_model(str(model)), max_tokens=num_tokens):
        best = np.array(mx.topk(logprobs, 2))
        if abs(best[0] - best[1]) < MARGIN or int(token) in _ENDS:
            return None
        tokens.append(int(token))
    return tokens


_ENDS = (1, 2)
"""End tokens of the tiny model and of SmolLM2."""
