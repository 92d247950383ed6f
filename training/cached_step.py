"""One training step of a whole-batch objective in micro-batches, with the gradient of the whole batch."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.objective import total_loss

Representations = dict[str, Tensor]


def cached_step(model: nn.Module, parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Add the gradient of the loss over all `parts` to the parameters' and return the objective's values.

    GradCache (Gao et al. 2021, section 3): represent every part without gradient, compare all of them once, then
    represent each part again and carry the gradient of its representations on. Memory is that of one part; the price is
    a second forward. `model` is a `WholeBatchObjective`, wrapped for several processes or not.
    """
    states, cached = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            cached.append(model(only_represent=True, **part))
    leaves = {
        name: torch.cat([representations[name] for representations in cached]).requires_grad_(
            cached[0][name].is_floating_point()
        )
        for name in cached[0]
    }
    last_state = _random_state()
    with _without_synchronising(model):
        values = model(representations=leaves)
        total_loss(values).backward()
        _represent_again(model, parts, states, cached, leaves)
    _average_gradients(model)
    _set_random_state(last_state)
    return {name: value.detach() for name, value in values.items()}


def _represent_again(
    model: nn.Module,
    parts: Sequence[Mapping[str, Any]],
    states: Sequence[Any],
    cached: Sequence[Representations],
    leaves: Representations,
) -> None:
    start = 0
    for part, state, before in zip(parts, states, cached, strict=True):
        _set_random_state(state)  # the same dropped paths as the first time
        size = len(next(iter(before.values())))
        again = model(only_represent=True, **part)
        carried = [
            (value, gradient[start : start + size])
            for name, value in again.items()
            if value.requires_grad and (gradient := leaves[name].grad) is not None
        ]
        torch.autograd.backward([value for value, _ in carried], [gradient for _, gradient in carried])
        start += size


def _without_synchronising(model: nn.Module) -> Any:
    """Under DistributedDataParallel gradients are averaged once, at the end: its own hooks want one backward a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _average_gradients(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        for parameter in model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad.div_(torch.distributed.get_world_size()))


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
