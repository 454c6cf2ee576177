"""The scripted model's mlx-lm side, loaded as ``mlx_lm.models.scripted``; see ``tests/scripted_model.py``."""

import time
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

SCRIPTED, END, CLOSER = 40.0, 20.0, 10.0
_ANCHOR, _RECENT = 1e6, 20.0
_DIM = 16


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    eos_token_id: int
    scripts: list[list[int]]
    anchors: list[list[list[int]]]
    selectors: list[int]
    closers: list[int] = field(default_factory=list)
    step_seconds: float = 0.0


def _table(rows: list[list[int]], fill: int) -> mx.array:
    width = max(len(row) for row in rows)
    return mx.array([[*row, *[fill] * (width - len(row))] for row in rows], dtype=mx.int32)


class Layer(nn.Module):
    """Attention that finds, per head, the latest anchor: (found, its position, its value)."""

    def __call__(self, matches: mx.array, values: mx.array, cache: Any) -> tuple[mx.array, mx.array]:
        batch, _, length = matches.shape
        offset = 0 if cache is None else cache.offset
        first = offset[:, None] if isinstance(offset, mx.array) and offset.ndim else offset
        positions = mx.broadcast_to(mx.arange(length)[None] + first, (batch, length)).astype(mx.float32)
        where = mx.broadcast_to(positions[:, None], matches.shape)
        keys = self._padded([matches * _ANCHOR + where * _RECENT])
        stored = self._padded([matches, where, values])
        queries = self._padded([mx.ones(matches.shape)])
        mask = create_attention_mask(mx.zeros((batch, length, 1)), cache)
        if cache is not None:
            keys, stored = cache.update_and_fetch(keys, stored)
        found = scaled_dot_product_attention(queries, keys, stored, cache=cache, scale=1.0, mask=mask)
        return mx.round(found), positions

    @staticmethod
    def _padded(parts: list[mx.array]) -> mx.array:
        rest = mx.zeros((*parts[0].shape, _DIM - len(parts)))
        return mx.concatenate([mx.stack(parts, axis=-1), rest], axis=-1)


class Trunk(nn.Module):
    """Token ids [B, L] to the next scripted token [B, L, 1]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.layers = [Layer()]
        selectors = [[token, number] for number, token in enumerate(args.selectors)]
        lists = [*args.anchors, selectors]
        self._tokens = _table([[token for token, _ in pairs] for pairs in lists], -1)
        self._values = _table([[value for _, value in pairs] for pairs in lists], 0)
        self._scripts = _table([[*script, args.eos_token_id] for script in args.scripts], args.eos_token_id)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        equal = inputs[:, None, :, None] == self._tokens[None, :, None, :]
        matches = equal.any(axis=-1).astype(mx.float32)
        values = (equal * self._values[None, :, None, :]).sum(axis=-1).astype(mx.float32)
        found, positions = self.layers[0](matches, values, None if cache is None else cache[0])
        chosen = mx.clip((found[:, -1, :, 0] * found[:, -1, :, 2]).astype(mx.int32), 0, len(self._scripts) - 1)
        place = found[:, :-1, :, 2] + positions[:, None] - found[:, :-1, :, 1]
        last = self._scripts.shape[1] - 1
        place = mx.where((found[:, :-1, :, 0] > 0) & (place >= 0) & (place < last), place, last).astype(mx.int32)
        mine = mx.take_along_axis(place, chosen[:, None], axis=1)[:, 0]
        return self._scripts[chosen, mine][..., None].astype(mx.float32)


class Model(nn.Module):
    """Follows its scripts; what a sampler forbids, it leaves out."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Trunk(args)
        self.unit = mx.ones((1,))
        ids = mx.arange(args.vocab_size)
        other = ((ids * 7919) % 10007).astype(mx.float32) / 10007
        if args.closers:
            other[mx.array(args.closers)] = CLOSER
        other[args.eos_token_id] = END
        self._ids, self._other = ids, other

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        if self.args.step_seconds:
            time.sleep(self.args.step_seconds)
        following = self.model(inputs, cache)
        return mx.where(following == self._ids, SCRIPTED, self._other) * self.unit

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers
