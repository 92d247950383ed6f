"""The processes of tests that need more than one: forked from one that has imported already what they all import."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

RANKS = 2


def processes() -> Any:
    """The context whose children start in a tenth of a second and not in the ten that the imports take."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.small_runs"])
    return context


def on_two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function` with 0 and `arguments`, and with 1 and `arguments`, each in a process of its own.

    Raises what either raised, with its traceback, and ends the other then.
    """
    processes()
    torch.multiprocessing.start_processes(function, arguments, nprocs=RANKS, start_method="forkserver")


def as_launched(rank: int, port: int) -> None:
    """Tell this process what torchrun tells the processes that it starts, and let it compute with one thread."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
