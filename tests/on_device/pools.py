"""Pools take the memory that the plan says."""

import gc
import sys

import mlx.core as mx

from engine.errors import ConfigError
from engine.runner.device.devices import describe_device
from engine.runner.kv.kv_spec import group_spec
from engine.runner.paged_backend import PagedBackend
from tests.engine.parity.bare_engine import BareEngine
from tests.engine.parity.tiny_architectures import CONFIGS, tiny_model


def pools() -> dict[str, dict[str, float]]:
    """Largest relative difference of a pool from the plan, over all architectures, by page type.

    What its arrays say, and what the device's memory in use grew by; of some size, since a device rounds up.
    """
    num_blocks = 4096 if describe_device().kind == "cpu" else 1 << 16
    worst = {dtype: {"arrays": 0.0, "memory": 0.0} for dtype in ("auto", "bfloat16", "int8", "int4")}
    for name in CONFIGS:
        model = tiny_model(name)
        for dtype, found in worst.items():
            try:
                engine = BareEngine(model, kv_cache_dtype=dtype)
            except ConfigError as error:  # vectors that cannot be quantized
                print(name, dtype, error, file=sys.stderr)
                continue
            if not isinstance(engine.backend, PagedBackend):
                continue
            for leaves, pool in zip(engine.backend.groups, engine.backend.pools, strict=True):
                spec = group_spec(leaves, engine.backend.block_size, 512, dtype)
                planned = num_blocks * spec.bytes_per_block
                pool.release()
                before = _memory_in_use()
                pool.grow(num_blocks)
                sizes = {"arrays": pool.nbytes, "memory": _memory_in_use() - before}
                for kind, size in sizes.items():
                    found[kind] = max(found[kind], abs(size / planned - 1))
                pool.release()
            engine.backend.close()
    return worst


def _memory_in_use() -> int:
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()
