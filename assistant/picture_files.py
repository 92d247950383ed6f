"""Find the picture files of a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def pictures_below(folder: Path) -> Iterator[Path]:
    """Every file below `folder` with a picture's suffix, in no order.

    Hidden files and folders are left out, and links to folders are not followed.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES):
                yield Path(parent, name)
