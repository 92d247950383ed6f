"""Measure two ways of doing one piece of work in turn: time, peak memory and arithmetic."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_flop_count

SHORTEST_SECONDS = 0.2  # what is quicker is done several times in a row, so that the clock and the caches matter little

Work = Callable[[], Tensor]
Shape = Sequence[int]


@dataclass(frozen=True)
class Pair:
    """One piece of work, done by us and by a peer on the same inputs; each call does it once and returns its loss."""

    name: str
    peer: str
    ours: Work
    theirs: Work
    tolerance: float  # relative, between the two first losses
    lever: str  # why ours should be faster, in a few words


@dataclass(frozen=True)
class Result:
    """What was measured of a pair; a ratio above 1 says that ours is faster."""

    name: str
    peer: str
    our_loss: float
    their_loss: float
    our_seconds: float  # median over rounds, of one call
    their_seconds: float
    ratios: tuple[float, ...]  # their seconds / ours, a round each
    our_memory: int  # bytes at the peak, beyond what was there before
    their_memory: int
    our_flops: int  # of matrix products, convolutions and attention; a multiply-add is two
    their_flops: int
    lever: str

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)


class Disagreement(ValueError):
    """The two sides of a pair do not compute the same loss: their times must not be compared."""


def compare(pair: Pair, rounds: int, device: torch.device) -> Result:
    """Check that both sides agree, then measure them. Raises Disagreement when they do not.

    The first call of each side is the check (and warms up), the second counts arithmetic, the third memory.
    """
    our_loss, their_loss = float(pair.ours()), float(pair.theirs())
    if not math.isclose(our_loss, their_loss, rel_tol=pair.tolerance):
        raise Disagreement(f"{pair.name}: our loss is {our_loss}, that of {pair.peer} {their_loss}")
    our_flops, their_flops = arithmetic(pair.ours), arithmetic(pair.theirs)
    our_memory, their_memory = peak_memory(pair.ours, device), peak_memory(pair.theirs, device)
    times = race(pair, rounds, device)
    return Result(
        name=pair.name,
        peer=pair.peer,
        our_loss=our_loss,
        their_loss=their_loss,
        our_seconds=statistics.median(ours for ours, _ in times),
        their_seconds=statistics.median(theirs for _, theirs in times),
        ratios=tuple(theirs / ours for ours, theirs in times),
        our_memory=our_memory,
        their_memory=their_memory,
        our_flops=our_flops,
        their_flops=their_flops,
        lever=pair.lever,
    )


def race(pair: Pair, rounds: int, device: torch.device) -> list[tuple[float, float]]:
    """Seconds of one call of ours and of theirs, a pair each round, taken one right after the other.

    What else the machine does changes from minute to minute and hits both alike; who goes first alternates.
    """
    works = (pair.ours, pair.theirs)
    repeats = [max(1, math.ceil(SHORTEST_SECONDS / seconds_of(work, 1, device))) for work in works]
    times = []
    for number in range(rounds):
        taken = [0.0, 0.0]
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            taken[side] = seconds_of(works[side], repeats[side], device)
        times.append((taken[0], taken[1]))
    return times


def seconds_of(work: Work, repeats: int, device: torch.device) -> float:
    """Wall-clock seconds of one call, over `repeats` calls in a row."""
    _finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    _finish(device)
    return (time.perf_counter() - start) / repeats


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attention_forward(query: Shape, key: Shape, value: Shape, *rest: Any, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **more: Any) -> int:
    # The scores once more, and from them the gradients of query, key, value and scores: five products for two.
    return sdpa_flop_count(query, key, value) * 5 // 2


def _product_added(added_to: Shape, left: Shape, right: Shape, *rest: Any, **more: Any) -> int:
    return int(addmm_flop(added_to, left, right))


# What torch leaves out of its count: products that are added in place, and the CPU's attention.
NOT_COUNTED = {
    torch.ops.aten.addmm_: _product_added,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def arithmetic(work: Work) -> int:
    """Floating-point operations of one call in matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED) as counter:
        work()
    return int(counter.get_total_flops())


def peak_memory(work: Work, device: torch.device) -> int:
    """Bytes of tensors at the peak of one call, beyond those that were there before.

    torch's allocator is asked, not the system: the resident size of a process depends on what the C library keeps for
    later and on who ran first. Scratch memory inside matrix products is not counted, on either side.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class Limit:
    """How many floating-point operations a second a large matrix product does here: the limit for everything else."""

    def __init__(self, side: int, dtype: torch.dtype, device: torch.device) -> None:
        """Of two `side` x `side` matrices."""
        self.device = device
        self._left, self._right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self.speed = 0.0
        self.look_again()

    def look_again(self, tries: int = 3) -> None:
        """The fastest product so far counts: a moment when the machine was busy is no limit."""
        operations = 2 * len(self._left) ** 3
        for _ in range(tries):
            seconds = seconds_of(lambda: self._left @ self._right, 1, self.device)
            self.speed = max(self.speed, operations / seconds)
