"""Write a folder aside and give it its name only when it is whole and right."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from assistant.models import ModelError


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends; whatever is raised, nothing is left.

    Raises ModelError where there is something at `folder` already, or no folder that it could be in.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ModelError(f"{folder}: there is something already; name a new folder")
    if not folder.absolute().parent.is_dir():
        raise ModelError(f"{folder}: there is no folder {folder.absolute().parent} that it could be in")
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir()
    try:
        yield aside
        if folder.exists():  # and is empty
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
