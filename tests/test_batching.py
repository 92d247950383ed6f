"""Pictures go through a tower in full batches, in order, while threads prepare the next ones."""

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from assistant.batching import BATCHES_AHEAD, in_batches


def view(number: int) -> Tensor | str:
    """One pixel that says the number; every third is damaged."""
    return "damaged" if number % 3 == 0 else torch.full((1, 3, 1, 1), float(number))


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
@pytest.mark.parametrize("count", [0, 1, 4, 31])
def test_order_is_kept_and_batches_are_full(batch: int, count: int) -> None:
    sizes = []

    def run(views: Tensor) -> Sequence[float]:
        sizes.append(len(views))
        return [float(pixel) + 0.5 for pixel in views[:, 0, 0, 0]]

    found = list(in_batches(range(count), view, run, batch))
    assert found == [(n, "damaged" if n % 3 == 0 else n + 0.5) for n in range(count)]
    good = sum(n % 3 != 0 for n in range(count))
    assert sizes == [batch] * (good // batch) + [good % batch] * (good % batch > 0)


def test_what_follows_is_prepared_while_the_tower_works() -> None:
    """Two batches and no more: a folder of any size takes the memory of a few pictures."""
    taken: list[int] = []
    prepared = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    def prepare(number: int) -> Tensor:
        prepared.release()
        return torch.zeros(1, 3, 1, 1)

    waited: list[bool] = []

    def run(views: Tensor) -> Sequence[int]:
        if not waited:
            # The first batch is at work: all that is ahead of it gets ready by itself.
            waited.extend(prepared.acquire(timeout=60) for _ in range(4 + 4 * BATCHES_AHEAD))
            assert len(taken) <= 4 + 4 * BATCHES_AHEAD + 1
        return [0] * len(views)

    assert len(list(in_batches(items(), prepare, run, 4))) == 1000
    assert all(waited)


def test_an_error_comes_out_where_its_item_stands_and_ends_the_rest() -> None:
    asked: list[int] = []

    def prepare(number: int) -> Tensor:
        asked.append(number)
        if number == 4:
            raise ValueError("picture 4")
        return torch.zeros(1, 3, 1, 1)

    found = in_batches(range(1000), prepare, lambda views: [0] * len(views), 2)
    assert [next(found)[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="picture 4"):
        next(found)
    assert len(asked) < 20
