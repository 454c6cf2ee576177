"""How much is measured: the whole suite, a quick one, and one so small that a CPU runs it in a test."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Lengths are in tokens."""

    shape: str = "qwen3-4b"
    context: int = 512
    batches: tuple[int, ...] = (1, 8, 32, 64)
    packed_batches: tuple[int, ...] = (1, 8, 32)
    long: tuple[tuple[int, int], ...] = ((8, 8192), (32, 4096))
    """Rows, and tokens of each."""
    sampled_batch: int = 32
    steps: int = 24
    """Steps measured in one turn."""
    slow_steps: int = 16
    """The same for the engine without kernels; 0 leaves it out."""
    repeats: int = 4
    """Turns of each variant: a shared host may be half as fast for a second or two."""
    long_repeats: int = 2
    """The same for cases of which one turn takes many seconds."""
    prompt: int = 8192
    prompt_repeats: int = 4
    shared: tuple[int, int, int] = (64, 4096, 16)
    """Requests, tokens that they share, tokens of their own."""
    long_prompt: int = 32768
    short_prompt: int = 64
    running: int = 8
    """Requests that decode while a long prompt is worked on."""
    wide: tuple[str, ...] = ("qwen3.5-35b-a3b", "gemma-4-26b-a4b")
    """Shapes with experts, in 4 bits."""
    wide_context: int = 256
    wide_steps: int = 12
    """Steps of mlx-lm's that are measured of them in one turn."""
    wide_prompt: int = 2048
    wide_max_model_len: int = 4096
    """Of this engine with such a shape: prompts with heads of 256 take memory by it where MLX fuses no attention."""
    clients: int = 32
    client_tokens: int = 128
    replica_rows: int = 1152
    """Prompts that two devices share, of ``replica_context`` tokens: eight full batches for each, since what the
    beginning and the end cost weighs twice as much with two."""
    replica_context: int = 64
    chunk: int = 2048
    max_model_len: int = 36864
    slow_max_model_len: int = 2048
    max_num_seqs: int = 72
    memory: float = 0.5
    """Of the device: mlx-lm has its own copy of the weights and its caches beside the engine."""
    slow_memory: float = 0.3
    read_bytes: int = 8 << 30
    matrix: int = 8192


FULL = Sizes()
QUICK = replace(FULL, slow_steps=8, repeats=1, long_repeats=1, prompt_repeats=2, wide_context=128, wide_steps=8)
TINY = Sizes(
    shape="tiny", context=24, batches=(1, 3), packed_batches=(2,), long=((2, 96),), sampled_batch=3, steps=8,
    slow_steps=6, repeats=1, long_repeats=1, prompt=160, prompt_repeats=1, shared=(3, 64, 4), long_prompt=768,
    short_prompt=8, running=2, wide=("tiny-hybrid", "tiny-gemma"), wide_context=40, wide_steps=6, wide_prompt=96,
    wide_max_model_len=512, clients=2, client_tokens=4, replica_rows=6, replica_context=8, chunk=64, max_model_len=1024,
    slow_max_model_len=256, max_num_seqs=4, memory=0.1, slow_memory=0.1, read_bytes=1 << 20, matrix=64,
)  # fmt: skip
