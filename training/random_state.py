"""Look at what trains without a trace: random state, modes of modules and gradients are as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Gives the generators of Python, NumPy, torch's CPU and all GPUs back as they were."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


@contextmanager
def only_looking(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode, without gradients and uncompiled; then each of its parts in the mode it was in.

    Random state is kept. Evaluation mode keeps batch norms and dropout from changing anything.
    """
    modes = [(part, part.training) for part in module.modules()]
    with kept_random_state(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        module.eval()
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
