"""Work on the host ahead of what takes its results, on several threads and in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    num_bytes: Callable[[Item], int],
    *,
    threads: int,
    most_bytes: int,
) -> Generator[tuple[Item, Result]]:
    """Each item with ``work(item)``, in the order of ``items``, while threads work on those that follow.

    Results that wait, of ``num_bytes`` each, take ``most_bytes`` together at most, or there is only one of them. What
    ``work`` raises comes out in the item's turn. Closing this ends the threads.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    held, following = 0, 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            while following < len(items) or waiting:
                while following < len(items) and len(waiting) < 2 * threads:
                    item = items[following]
                    if waiting and held + num_bytes(item) > most_bytes:
                        break
                    waiting.append((item, pool.submit(work, item)))
                    held += num_bytes(item)
                    following += 1
                item, future = waiting.popleft()
                yield item, future.result()
                held -= num_bytes(item)
        finally:
            for _, future in waiting:
                future.cancel()
