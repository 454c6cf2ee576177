"""Do rows' tokens come out as they should on this GPU? Asked at load; tests and checks on devices ask it too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.errors import error_line
from engine.runner.device.host import floats, to_numpy
from engine.runner.kernels.best_rows import BestRows
from engine.runner.kernels.draw_rows import FEWEST_ROWS, KEEP_ALL, LOG2_E, NUM_WISHES, DrawRows
from engine.runner.kernels.draw_rows_text import MOST_BLOCKS
from engine.runner.kernels.kernel_cache import collecting, compile_all

Floats = NDArray[np.float32]
_ROUNDING = 2e-5
"""Of a row's mass: so near to a boundary either side is right."""
_SIZES = (20_000, 4_099)
"""Widths of the rows: in vectors, and number by number."""
_DRAWS = 6
"""Of a row in which one token more or less shows best."""
_UNIFORMS = ((0.0, 0.999), (0.42, 0.0), (0.87, 0.31), (1 - 2.0**-16, 1 - 2.0**-16))


@dataclass(frozen=True, slots=True)
class Wish:
    """What a row asks for. Temperature 0 is greedy; ``entry`` is its row of the counts, -1 for no penalties."""

    temperature: float = 0.0
    min_p: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    frequency: float = 0.0
    presence: float = 0.0
    entry: int = -1

    def numbers(self) -> list[float]:
        """As a kernel takes them."""
        scale = LOG2_E / self.temperature if self.temperature else 0.0
        top_p = self.top_p if self.top_p < 1 else KEEP_ALL
        return [scale, self.min_p, top_p, float(self.top_k), self.frequency, self.presence, float(self.entry), 0.0]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Wish":
        """From what :meth:`numbers` gives."""
        scale, min_p, top_p, top_k, frequency, presence, entry = numbers[:7]
        temperature = LOG2_E / scale if scale else 0.0
        return cls(temperature, min_p, top_p, int(top_k), frequency, presence, int(entry))


def wishes_array(wishes: Sequence[Wish]) -> Floats:
    """[R, 8] as :func:`engine.runner.kernels.draw_rows.draw_rows` takes them."""
    numbers = np.array([wish.numbers() for wish in wishes], np.float32)
    assert numbers.shape[1] == NUM_WISHES
    return numbers


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a check: its logits float32 [V], what it asks for, and its uniforms."""

    logits: Floats
    wish: Wish
    uniforms: tuple[float, float]


def draw_problem(dtypes: Sequence[mx.Dtype], kernel: DrawRows, sizes: Sequence[int] = _SIZES) -> str | None:
    """Draw rows of each element type, with and without penalties, beside numpy: one line on the first thing wrong.

    None if nothing is. Raises nothing.
    """
    try:
        with collecting() as awaited:
            _launch_each(kernel, dtypes)
        compile_all(awaited)
        cases = [(dtype, size, penalties) for dtype in dtypes for size in sizes for penalties in (False, True)]
        return next((problem for case in cases if (problem := _problem(kernel, *case))), None)
    except Exception as error:  # noqa: BLE001  (whatever stops a kernel, MLX's own operations are there)
        return error_line(error)


def best_problem(dtype: mx.Dtype, kernel: BestRows, sizes: Sequence[int] = _SIZES) -> str | None:
    """Take the likeliest tokens of rows of every kind beside numpy: one line on the first that is wrong, or None.

    Raises nothing.
    """
    try:
        with collecting() as awaited:
            kernel(mx.zeros((1, 32), dtype))
        compile_all(awaited)
        for size in sizes:
            rows = [replace(row, wish=Wish()) for row in some_rows(size)]
            last = rows[0].logits.copy()
            last[-1] = 1 + last.max()
            rows.append(replace(rows[0], logits=last))
            logits = mx.array(np.stack([row.logits for row in rows])).astype(dtype)
            exact = floats(logits)
            for row, own, token in zip(rows, exact, _token_ids(kernel(logits)), strict=True):
                if problem := token_problem(own, row, token):
                    return f"{size} {str(dtype).rpartition('.')[2]} logits: {problem}"
        return None
    except Exception as error:  # noqa: BLE001  (whatever stops a kernel, there is another way)
        return error_line(error)


def _launch_each(kernel: DrawRows, dtypes: Sequence[mx.Dtype]) -> None:
    """Launch what is compiled by itself, on zeros; nothing is evaluated."""
    for dtype in dtypes:
        given = mx.zeros((1, 32), dtype), mx.zeros((1, NUM_WISHES)), mx.zeros((FEWEST_ROWS, 2))
        kernel(*given)
        kernel(*given, mx.zeros((1, 32)), mx.zeros((1,), mx.int32))


def _problem(kernel: DrawRows, dtype: mx.Dtype, size: int, penalties: bool) -> str | None:
    """Many rows, and then few: on Metal arrays of fewer than 8 numbers make another kernel."""
    rows = some_rows(size)
    for some in (rows, rows[1:4]):
        tokens, logits, counts = drawn(kernel, some, dtype, penalties=penalties)
        for row, token, own, count in zip(some, tokens, logits, counts, strict=True):
            if problem := token_problem(penalized(own, row.wish, count if penalties else None), row, token):
                return f"{size} {str(dtype).rpartition('.')[2]} logits, {row.wish}: {problem}"
    return None


def drawn(
    kernel: DrawRows, rows: Sequence[Row], dtype: mx.Dtype, *, penalties: bool
) -> tuple[list[int], Floats, Floats]:
    """Tokens, the logits [R, V] as the element type holds them, and each row's counts [R, V] at the draw.

    The counts come of two launches: the second counts the tokens of the first.
    """
    logits = mx.array(np.stack([row.logits for row in rows])).astype(dtype)
    uniforms = np.zeros((max(len(rows), FEWEST_ROWS), 2), np.float32)
    uniforms[: len(rows)] = [row.uniforms for row in rows]
    exact = floats(logits)
    counts = np.zeros_like(exact)
    if not penalties:
        wishes = wishes_array([replace(row.wish, entry=-1) for row in rows])
        return _token_ids(kernel(logits, mx.array(wishes), mx.array(uniforms))), exact, counts
    # The rows' counts in another order than the rows; one row has none.
    entries = [len(rows) - 2 - number for number in range(len(rows))]
    wishes = wishes_array([replace(row.wish, entry=entry) for row, entry in zip(rows, entries, strict=True)])
    kept = mx.zeros((max(len(rows) - 1, 1), exact.shape[1])) + 0
    pending = mx.full((len(rows),), -1, mx.int32)
    mx.eval(kept)
    first = kernel(logits, mx.array(wishes), mx.array(uniforms), kept, pending)
    tokens = kernel(logits, mx.array(wishes), mx.array(uniforms), kept, first)
    for row, (entry, token) in enumerate(zip(entries, _token_ids(first), strict=True)):
        counts[row, token] += entry >= 0 and token >= 0
    held = to_numpy(kept + mx.where(tokens[:1] == 0, 0.0, 0.0))  # read only once the launch has written
    for row, entry in enumerate(entries):
        if entry >= 0 and not np.array_equal(held[entry], counts[row]):
            raise ValueError("a pending token was not counted once")
    return _token_ids(tokens), exact, counts


def _token_ids(tokens: mx.array) -> list[int]:
    found: list[int] = to_numpy(tokens).tolist()
    return found


def penalized(logits: Floats, wish: Wish, counts: Floats | None) -> Floats:
    """The logits after penalties, rounded after every operation."""
    if counts is None:
        return logits
    lower: Floats = logits - np.float32(wish.frequency) * counts
    return np.where(counts > 0, lower - np.float32(wish.presence), lower).astype(np.float32)


def token_problem(logits: Floats, row: Row, token: int) -> str | None:
    """What is wrong with the token of a row, up to rounding of its mass, or None."""
    most = logits.max()
    if not np.isfinite(most):
        return None if token == -1 else f"token {token} of a row without any"
    if not 0 <= token < len(logits):
        return f"token {token}"
    if not row.wish.temperature:
        best = int(logits.argmax())
        return None if token == best else f"token {token}, the largest is {best}"
    near = (row.wish, *(replace(row.wish, top_p=row.wish.top_p * (1 + sign * _ROUNDING)) for sign in (-1, 1)))
    if any(_is_drawn(kept_weights(logits, wish), row.uniforms, token) for wish in near):
        return None
    return f"token {token} is not where {row.uniforms} point"


def kept_weights(logits: Floats, wish: Wish) -> NDArray[np.float64]:
    """Weights over the likeliest token's, 0 for what is not kept: min_p, top_k and top_p, ties at a bound kept."""
    weights: NDArray[np.float64] = np.exp2((logits.astype(np.float64) - logits.max()) * (LOG2_E / wish.temperature))
    weights[weights < wish.min_p] = 0.0
    if 0 < wish.top_k < len(weights):
        weights[logits < np.partition(logits, -wish.top_k)[-wish.top_k]] = 0.0
    if wish.top_p < 1:
        left = np.flatnonzero(weights)
        order = left[np.argsort(-logits[left], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        kept = before < wish.top_p * weights.sum()
        weights[logits < logits[order][kept].min()] = 0.0
    return weights


def _is_drawn(weights: NDArray[np.float64], uniforms: tuple[float, float], token: int) -> bool:
    """Whether ``token`` lies where the uniforms point: its block among the blocks, and it in its block."""
    size = block_size(len(weights))
    padded = np.pad(weights, (0, -len(weights) % size)).reshape(-1, size)
    block, offset = divmod(token, size)
    return _covers(padded.sum(axis=1), block, uniforms[0]) and _covers(padded[block], offset, uniforms[1])


def _covers(weights: NDArray[np.float64], index: int, uniform: float) -> bool:
    ends = np.cumsum(weights) / weights.sum()
    begin = ends[index - 1] if index else 0.0
    return bool(weights[index] > 0 and begin - _ROUNDING <= uniform <= ends[index] + _ROUNDING)


def block_size(width: int) -> int:
    """Columns of a block of the draw over rows of ``width``."""
    size = next((size for size in (256, 128, 64, 32) if width % size == 0), 256)
    return size if width // size <= MOST_BLOCKS else 256


def some_rows(width: int) -> list[Row]:
    """Rows of every kind, the same at every call."""
    rng = np.random.default_rng(width)
    return list(_rows(rng, width))


def _rows(rng: np.random.Generator, width: int) -> Iterator[Row]:
    peaked = rng.standard_normal(width).astype(np.float32) * 4
    flat = rng.standard_normal(width).astype(np.float32) * np.float32(0.05)
    ties = np.round(rng.standard_normal(width).astype(np.float32) * 2)
    zeros = np.minimum(ties, np.copysign(np.float32(0.0), peaked))  # of both signs
    equal, nowhere, forbidden = np.full(width, 0.5, np.float32), np.full(width, -np.inf, np.float32), peaked.copy()
    forbidden[: width // 2] = -np.inf
    crowd = np.full(width, -1.0, np.float32)  # from which few stand out, in one block
    crowd[10:13] = 3.0, 2.5, 2.0
    broken = peaked.copy()
    broken[width - 2] = np.nan
    usual = Wish(0.7, top_p=0.8, top_k=20, presence=1.5)
    wishes = [
        (peaked, usual), (peaked, Wish(0.0, frequency=0.5)), (peaked, Wish(1.0)), (peaked, replace(usual, top_k=1)),
        (peaked, Wish(1.0, top_p=0.9, frequency=0.7, presence=-0.2)), (peaked, Wish(1.3, min_p=0.05, top_k=50)),
        (peaked, Wish(2.0, top_p=0.95, min_p=0.001)), (peaked, Wish(1.0, top_k=width // 3, top_p=0.7)),
        (flat, Wish(1.0, top_p=0.6)), (flat, usual), (flat, Wish(1.0, top_k=2)), (crowd, Wish(1.0, top_k=3)),
        (ties, Wish(1.0, top_k=3)), (ties, Wish(0.9, top_k=700, top_p=0.5)), (ties, Wish(0.0)), (equal, usual),
        (equal, Wish(1.0, top_p=0.3)), (equal, Wish(0.0)), (zeros, Wish(0.0)), (zeros, Wish(1.0, top_k=1)),
        (nowhere, usual), (nowhere, Wish(0.0)), (broken, usual), (broken, Wish(0.0)), (forbidden, usual),
        (forbidden, Wish(1.0)),
    ]  # fmt: skip
    for number, (logits, wish) in enumerate(wishes):
        yield Row(logits, wish, _UNIFORMS[number % len(_UNIFORMS)])
        draws = 0 if not wish.temperature else _DRAWS if logits is flat and wish.top_p == 1 else 1
        for draw in range(draws):
            yield Row(logits, wish, ((draw + 0.43) / draws, float(rng.random(dtype=np.float32))))
