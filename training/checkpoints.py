"""Checkpoints that are whole or not there: written aside, sealed, and only then given their name."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from assistant.durable import to_disk
from training.config import TrainingError

PARTIAL = "partial"  # the folder in which the next checkpoint is written
SEAL = "files.json"  # written last: every file of a checkpoint and its size
# A disk or a quota that is full, and a file that may not grow: what people can mend and go on.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def seal(checkpoint: Path) -> None:
    """Bring every file of `checkpoint` to the disk, and write down which they are and how long."""
    sizes = _sizes(checkpoint)
    (checkpoint / SEAL).write_text(json.dumps(sizes, indent=2, sort_keys=True) + "\n")
    for file in (*sizes, SEAL):
        to_disk(checkpoint / file)
    to_disk(checkpoint)


def publish(partial: Path, kept: int) -> None:
    """Give the one sealed checkpoint in the folder `partial` its place beside it; only the newest `kept` stay."""
    (written,) = partial.iterdir()
    seal(written)
    place = partial.parent / written.name
    if place.exists():  # a damaged one of the same step
        shutil.rmtree(place)
    written.rename(place)
    partial.rmdir()
    to_disk(partial.parent)
    rotate_checkpoints(str(partial.parent), kept, use_mtime=True)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with `checkpoint` in words: a file that is missing or cut; None when it is whole."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text())
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except ValueError:
        return f"{SEAL} is damaged"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with each newer one, by its name.

    None where there is no checkpoint yet. Raises TrainingError where there are some and none is whole.
    """
    if not folder.is_dir():
        return None, []
    faults: list[str] = []
    for name in reversed(sort_checkpoints(str(folder))):
        fault = fault_of(Path(name))
        if fault is None:
            return Path(name), faults
        faults.append(f"{Path(name).name}: {fault}")
    if faults:
        raise TrainingError(
            f"no checkpoint in {folder} is whole ({'; '.join(faults)}). Put a whole one there, or delete the folder "
            "to begin this stage again"
        )
    return None, []


@contextmanager
def plain_words_when_full(folder: Path) -> Iterator[None]:
    """Raises TrainingError instead where something cannot be written because there is no room on the disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise TrainingError(_no_room(folder, str(error))) from error


@contextmanager
def keeps_the_one_before(folder: Path, step: int) -> Iterator[None]:
    """While the checkpoint of `step` is written in `folder`: whatever fails, the one before stays, and that is said.

    Libraries say in different ways that they cannot write, so that every such error is taken for it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        before, _ = newest_whole(folder)
        kept = f"{before} is whole and stays" if before is not None else "There is none before it"
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"the checkpoint of step {step} could not be written: {_no_room(folder, reason)}. {kept}"
        ) from error


def _no_room(folder: Path, reason: str) -> str:
    free = shutil.disk_usage(folder).free / 2**20
    return (
        f"{reason} ({free:,.0f} MiB are free on the disk of {folder}). Make room, and the same command goes on from "
        "the newest checkpoint"
    )


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (file for file in checkpoint.rglob("*") if file.is_file() and file.name != SEAL)
    return {str(file.relative_to(checkpoint)): file.stat().st_size for file in files}
