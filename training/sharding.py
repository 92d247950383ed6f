"""Weights that FSDP spreads over the ranks: whole again for checkpoints and exports, and back into their shards."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds a part of each weight of `module` on each rank."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def gather_weights(module: nn.Module) -> None:
    """Make every weight of `module` whole, on the CPU of each rank, where it stays; tied weights stay tied.

    All ranks must call, and none may train it after that.
    """
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(weight, DTensor):
                if weight not in whole:
                    whole[weight] = nn.Parameter(weight.full_tensor().detach().cpu(), weight.requires_grad)
                setattr(part, name, whole[weight])


@torch.no_grad()
def load_whole_weights(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Give each rank its part of `whole`, which each of them brings; tied weights follow. All ranks must call.

    Raises ValueError when names do not fit.
    """
    own: dict[str, Tensor] = dict(module.named_parameters())
    own |= {name: buffer for name, buffer in module.named_buffers() if name in whole}
    if own.keys() != whole.keys():
        raise ValueError(f"these weights are of another objective: {sorted(own.keys() ^ whole.keys())[:3]}")
    for name, weight in own.items():
        value = whole[name].to(weight.device)
        if isinstance(weight, DTensor):
            value = distribute_tensor(value, weight.device_mesh, weight.placements)
        weight.copy_(value)


def local(weight: Tensor) -> Tensor:
    """The part of `weight` that this rank holds: all of it where nothing is sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
