"""Put many pictures through a tower in batches, while threads prepare the next ones."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

BATCHES_AHEAD = 2  # prepared beside the one that the tower looks at

Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")


def in_batches(
    items: Iterable[Item],
    prepare: Callable[[Item], Tensor | Other],
    run: Callable[[Tensor], Sequence[Result] | Tensor],
    batch: int,
) -> Iterator[tuple[Item, Result | Other]]:
    """Each item with what became of it, in the given order.

    Args:
        items: what is asked for; no more of them are taken than are about to be prepared.
        prepare: called in threads. Gives float32 (1, 3, H, W) for the tower, or anything but a tensor, such as an
            error: that is handed on as it is, and leaves its place in the batch to another.
        run: float32 (B, 3, H, W), `batch` of them at most -> B results. Called in this thread.
        batch: pictures that go through `run` at once; the last ones may be fewer.

    Raises what `prepare` raises, at the place of its item.
    """
    held: list[tuple[Item, Tensor | Other]] = []
    views = 0
    for item, prepared in _prepared(items, prepare, batch * BATCHES_AHEAD):
        held.append((item, prepared))
        views += isinstance(prepared, Tensor)
        if views in (0, batch):
            yield from _results(held, run)
            held, views = [], 0
    yield from _results(held, run)


def _results(
    held: list[tuple[Item, Tensor | Other]], run: Callable[[Tensor], Sequence[Result] | Tensor]
) -> Iterator[tuple[Item, Result | Other]]:
    views = [prepared for _, prepared in held if isinstance(prepared, Tensor)]
    results = iter(run(torch.cat(views)) if views else ())
    for item, prepared in held:
        yield item, next(results) if isinstance(prepared, Tensor) else prepared


def _prepared(
    items: Iterable[Item], prepare: Callable[[Item], Tensor | Other], ahead: int
) -> Iterator[tuple[Item, Tensor | Other]]:
    """Each item with what `prepare` gives, while threads work on up to `ahead` of those that follow."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    waiting: deque[tuple[Item, Future[Tensor | Other]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(prepare, item)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        # Who stops early, by Ctrl-C or an error, does not wait for pictures that nobody wants any more.
        pool.shutdown(cancel_futures=True)
