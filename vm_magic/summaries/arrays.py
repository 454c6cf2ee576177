"""Arrays of numpy, mlx and torch. Of large ones a sample is read, and what is lazy is not computed for this."""

import sys
from typing import Any

from vm_magic.summaries.text import number, short_repr

WHOLE = 1_000_000
"""Elements up to which all are read."""
_BLOCKS, _BLOCK = 64, 1024
"""A sample of a larger array: so many runs of so many elements, evenly apart."""
_FIRST = 8
_SHOWN_WHOLE = 200
"""Elements up to which all are shown."""
_LONGEST_WHOLE = 1200


def numpy_array(array: Any, limit: int) -> str:  # noqa: ARG001
    """Shape, type, range, mean, missing values, first values."""
    if array.ndim == 0 and array.dtype.names is None:
        return str(array)
    kind = type(array).__name__
    head = f"numpy {'array' if kind == 'ndarray' else kind} of shape {_shape(array.shape)}, {_dtype(array.dtype)}"
    return f"{head}{_facts(array)}"


def mlx_array(array: Any, limit: int) -> str:  # noqa: ARG001 - every describer is called alike
    """Shape and type; range and first values where printing it would compute no more than this does."""
    head = f"mlx array of shape {_shape(array.shape)}, {str(array.dtype).removeprefix('mlx.core.')}"
    if array.size > WHOLE:
        return f"{head} ({array.nbytes:,} bytes; the values of so large an array are not computed for this)"
    import numpy

    core = sys.modules["mlx.core"]  # it is loaded: it made this array
    if array.dtype == core.bfloat16:
        array = array.astype(core.float32)
    return f"{head}{_facts(numpy.array(array))}"


def torch_tensor(tensor: Any, limit: int) -> str:  # noqa: ARG001
    """Shape, type, device; range and first values, of a large one from a sample."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    grad = ", requires_grad" if tensor.requires_grad else ""
    head = f"torch tensor of shape {_shape(tuple(tensor.shape))}, {dtype}, {tensor.device}{grad}"
    plain = tensor.detach()
    if plain.is_sparse or plain.is_quantized or (plain.numel() > WHOLE and not plain.is_contiguous()):
        return head
    note = ""
    if plain.numel() > WHOLE:
        plain, note = plain.reshape(-1)[:: plain.numel() // (_BLOCKS * _BLOCK)], " of a sample"
    if dtype in ("bfloat16", "float16") or dtype.startswith("float8"):
        plain = plain.float()
    return f"{head}{_facts(plain.cpu().numpy(), note)}"


def own_summary(value: Any, limit: int) -> str:
    """The object's own text, which is a summary already (xarray)."""
    return str(value) or short_repr(value, limit)


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(f'{size:,}' for size in shape)}{',' if len(shape) == 1 else ''})"


def _dtype(dtype: Any) -> str:
    return f"fields {', '.join(dtype.names)}" if dtype.names else str(dtype)


def _facts(array: Any, note: str = "") -> str:
    """``: 0 … 9, mean 4.5, 2 NaN`` and a line of first values."""
    if array.size == 0:
        return ": empty"
    flat, sampled = _flat(array)
    note = note or (f" of a sample of {flat.size:,}" if sampled else "")
    values = _values(array)
    kind = array.dtype.kind
    if kind == "b":
        return f": {int(flat.sum()):,} of {flat.size:,} true{note if sampled else ''}{values}"
    if kind not in "iuf":
        return values
    missing = int((flat != flat).sum()) if kind == "f" else 0
    present = flat[flat == flat] if missing else flat
    parts = [f"{missing:,} NaN"] if missing else []
    if present.size:
        mean = present.mean(dtype="float64")
        low, high = (number(one.item()) for one in (present.min(), present.max()))
        parts = [f"{low} … {high}", f"mean {number(float(mean))}", *parts]
    return f": {', '.join(parts)}{f' ({note.strip()})' if note else ''}{values}"


def _flat(array: Any) -> tuple[Any, bool]:
    """All elements in a row, or a sample; the whole of a large array is never copied."""
    if array.size <= WHOLE:
        return array.reshape(-1), False
    import numpy

    starts = range(0, array.size - _BLOCK, (array.size - _BLOCK) // (_BLOCKS - 1))
    return numpy.concatenate([array.flat[start : start + _BLOCK] for start in starts]), True


def _values(array: Any) -> str:
    """A small array as numpy prints it; of others the first values, as a row of the last axis."""
    whole = str(array) if array.size <= _SHOWN_WHOLE else ""
    if whole and len(whole) <= _LONGEST_WHOLE:
        return f"\nvalues:\n{whole}"
    row = array
    for _ in range(array.ndim - 1):  # a matrix has two axes however often one is taken
        row = row[0] if row.shape[0] else row
    shown = [number(one) if isinstance(one, int | float) else short_repr(one, 40) for one in row[:_FIRST].tolist()]
    return f"\nfirst values: [{', '.join(shown)}, …]"
