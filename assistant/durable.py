"""See that what was written lies on the disk, so that a crash of the machine finds it whole."""

import os
from pathlib import Path


def to_disk(place: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk. Raises OSError."""
    opened = os.open(place, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
