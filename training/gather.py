"""Bring what the ranks of a run hold together, with and without gradient.

Each rank must bring tensors of the same shape. Without `torch.distributed` there is one rank, and all of these return
what they were given.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def ranks() -> int:
    """R, how many processes train together."""
    return distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def gather_with_gradient(local: Tensor) -> Tensor:
    """(b, ...) of each rank -> (R * b, ...) of all, in the order of the ranks; no second derivative.

    Going back, the gradients that all ranks have for a rank's own part are summed. When each rank's loss is the mean
    over its own samples and the trainer averages the gradients of parameters over the ranks (as DDP does), the result
    is the gradient of the mean over all samples.
    """
    if ranks() == 1:
        return local
    return _Gather.apply(local)


def gather(local: Tensor) -> Tensor:
    """(b, ...) of each rank -> (R * b, ...) of all, in the order of the ranks, without gradient."""
    local = local.detach()
    if ranks() == 1:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(ranks())]
    distributed.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def others_of(everyone: Tensor) -> Tensor:
    """(R * b, ...) of all ranks -> ((R - 1) * b, ...) of the other ranks."""
    own = len(everyone) // ranks()
    return torch.cat([everyone[: rank() * own], everyone[(rank() + 1) * own :]])


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of all ranks' values, without gradient."""
    total = value.detach().clone()
    if ranks() > 1:
        distributed.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of all ranks' values, without gradient."""
    return sum_over_ranks(value) / ranks()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank; each must call, with the device that it trains on."""
    return flag if ranks() == 1 else bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def exchange_with_neighbour(local: Tensor) -> Tensor:
    """What the rank before this one holds (the last one's for the first), without gradient.

    After R - 1 exchanges each rank has seen all blocks and has held two at most; after R its own is back.
    """
    local = local.detach()
    if ranks() == 1:
        return local
    received = torch.empty_like(local, memory_format=torch.contiguous_format)
    after, before = (rank() + 1) % ranks(), (rank() - 1) % ranks()
    transfers = [
        distributed.P2POp(distributed.isend, local.contiguous(), after),
        distributed.P2POp(distributed.irecv, received, before),
    ]
    for transfer in distributed.batch_isend_irecv(transfers):
        transfer.wait()
    return received


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return gather(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        return sum_over_ranks(outputs[0]).chunk(ranks())[rank()]
