"""Whether the memory of running sequences fits into smaller pools, and who would have to end first if not."""

from collections.abc import Sequence

from engine.core.cache_groups import KVCacheGroup
from engine.core.request import Request


def must_end(
    running: Sequence[Request], groups: Sequence[KVCacheGroup], sizes: Sequence[int], max_num_seqs: int
) -> list[Request]:
    """The requests of ``running`` that must end before pools of ``sizes`` blocks (by group) hold the others.

    The least urgent and latest come, as in preemption; none where all fit.
    """
    keep = sorted(running, key=lambda r: (r.priority, r.arrival_time, r.index))
    end: list[Request] = []
    while keep and not _fit(keep, groups, sizes, max_num_seqs):
        end.append(keep.pop())
    return end


def _fit(running: Sequence[Request], groups: Sequence[KVCacheGroup], sizes: Sequence[int], max_num_seqs: int) -> bool:
    if len(running) > max_num_seqs:
        return False
    # Requests may share blocks, so each is counted once.
    held = ({block for request in running for block in group.held_blocks(request)} for group in groups)
    return all(len(blocks) <= size for blocks, size in zip(held, sizes, strict=True))
