"""What is known of an adapter that is served, kept beside its copy so that it is there again after a restart."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import anyio

from assistant.hashing import weights_hash

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


async def write_note(adapter: Adapter, base: Path) -> None:
    """Note the adapter beside its copy; a copy without a note is removed at the next start."""
    note = {
        "name": adapter.name,
        "owner": adapter.owner,
        "created": adapter.created,
        "modules": adapter.modules,
        "rank": adapter.rank,
        "base_sha256": await anyio.to_thread.run_sync(weights_hash, base),
    }
    partial = adapter.folder / f"{NOTE}.partial"
    partial.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    partial.replace(adapter.folder / NOTE)


def remove_note(adapter: Adapter) -> None:
    """Forget the adapter after this run of the gateway."""
    (adapter.folder / NOTE).unlink(missing_ok=True)


async def read_notes(kept: Path, base: Path) -> list[Adapter]:
    """The adapters that were kept in the folder `kept` for the base in the folder `base`, oldest first.

    Those of another base stay where they are. Copies without a note were unloaded, or never finished: they are removed.
    """
    found = sorted(kept.glob(f"*/{NOTE}"))
    for folder in {path for path in kept.iterdir() if path.is_dir()} - {note.parent for note in found}:
        shutil.rmtree(folder)
    of_base = await anyio.to_thread.run_sync(weights_hash, base) if found else ""
    adapters = []
    for path in found:
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            if note.pop("base_sha256") != of_base:
                log.warning("The adapter %s is for another base than the one that is served now.", note["name"])
                continue
            adapters.append(Adapter(**note, folder=path.parent.resolve()))
        except (ValueError, KeyError, TypeError) as error:
            log.error("%s is damaged (%s): its adapter is not served.", path, error)
    return sorted(adapters, key=lambda adapter: (adapter.created, adapter.name))
