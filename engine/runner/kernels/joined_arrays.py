"""Arrays that become one, of which each keeps a slice: weights that one launch takes, without a second copy."""

from collections.abc import Sequence

import mlx.core as mx


def in_one_array(parts: Sequence[mx.array]) -> tuple[mx.array, list[mx.array]]:
    """``parts`` [.., ...] along their first axis, and the slice of it that has each one's values; evaluated.

    Slices look at its memory, where an integer index would copy.
    """
    whole = mx.concatenate(list(parts))
    mx.eval(whole)
    slices, first = [], 0
    for part in parts:
        end = first + part.shape[0]
        slices.append(whole[first:end])
        first = end
    mx.eval(slices)
    return whole, slices
