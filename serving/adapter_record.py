"""What is known of an adapter that is served, kept beside its copy so that it is there again after a restart."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.keys import write_whole

NOTE = "kangaroo.json"

log = logging.getLogger("kangaroo.adapters")


@dataclass(frozen=True)
class Adapter:
    """One that is served. `owner` is the name of the key that alone sees it; None: everybody does.

    `folder` is our own copy, so that nobody changes or removes what vLLM may read again. `held_by` is the engine (its
    address, and how often it was started again) that was given it last.
    """

    name: str
    owner: str | None
    created: int
    modules: int
    rank: int
    folder: Path
    held_by: tuple[str, int] | None = None


def write_note(adapter: Adapter, of_base: str) -> None:
    """Note the adapter beside its copy; `of_base` is the hash of the base's weights."""
    note = {"name": adapter.name, "owner": adapter.owner, "created": adapter.created}
    note |= {"modules": adapter.modules, "rank": adapter.rank, "base_sha256": of_base}
    write_whole(adapter.folder / NOTE, json.dumps(note, indent=1) + "\n")


def remove_note(adapter: Adapter) -> None:
    """Forget the adapter after this run of the gateway."""
    (adapter.folder / NOTE).unlink(missing_ok=True)


def remove_unnoted(kept: Path) -> list[Path]:
    """The notes in the folder `kept`. Copies without one were unloaded, or never finished: they are removed."""
    found = sorted(kept.glob(f"*/{NOTE}"))
    for folder in {path for path in kept.iterdir() if path.is_dir()} - {note.parent for note in found}:
        shutil.rmtree(folder)
    return found


def read_notes(notes: Sequence[Path], of_base: str) -> list[Adapter]:
    """The adapters that were noted for the base whose weights have the hash `of_base`, oldest first.

    Those of another base stay where they are.
    """
    adapters = []
    for path in notes:
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            if note.pop("base_sha256") != of_base:
                log.warning("The adapter %s is for another base than the one that is served now.", note["name"])
                continue
            adapters.append(Adapter(**note, folder=path.parent.resolve()))
        except (ValueError, KeyError, TypeError) as error:
            log.error("%s is damaged (%s): its adapter is not served.", path, error)
    return sorted(adapters, key=lambda adapter: (adapter.created, adapter.name))
