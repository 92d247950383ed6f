"""Several processes of one run, as torchrun and accelerate launch start them: what each takes, and where they meet."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from training.config import RecipeError


def met() -> PartialState:
    """This process among those of the run; the main one of one where nobody launched several.

    The first call joins them; on CPUs over gloo, where accelerate by itself would leave each of them alone.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def dividing(batch: int) -> int:
    """The largest step of at most `batch` lessons that the processes can share, or one lesson each."""
    ranks = met().num_processes
    return max(1, batch // ranks) * ranks


def share_of(batch: int) -> int:
    """What each process takes of a step of `batch` lessons. Raises RecipeError where it does not divide."""
    ranks = met().num_processes
    if batch % ranks:
        low = batch // ranks * ranks
        fits = f"{low} or {low + ranks}" if low else f"{ranks}"
        raise RecipeError(f"--batch {batch} does not divide among {ranks} processes: say {fits}")
    return batch // ranks


@contextmanager
def passing_folder(prefix: str, runs: Path) -> Iterator[Path]:
    """An empty folder, the same on all processes, that is gone afterwards.

    Of a single process it is among the system's temporary ones; of several below `runs`, which all their machines see.
    """
    state = met()
    if state.num_processes == 1:
        with tempfile.TemporaryDirectory(prefix=prefix) as alone:
            yield Path(alone)
        return
    names = [""]
    if state.is_main_process:
        runs.mkdir(parents=True, exist_ok=True)
        names = [tempfile.mkdtemp(prefix=f".{prefix}", dir=runs)]
    broadcast_object_list(names)
    try:
        yield Path(names[0])
        state.wait_for_everyone()
    finally:
        # After an error nobody is waited for: the others may never come.
        if state.is_main_process:
            shutil.rmtree(names[0], ignore_errors=True)
