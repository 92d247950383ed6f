"""Read a folder of pictures, in sub-folders that name their labels where there are any."""

import os
from collections.abc import Iterator
from pathlib import Path

from training.data.catalogue import Catalogue, stamp_of
from training.data.pictures import DataError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


class FolderPictures:
    """Every picture below `folder`, in the order of their paths; the label is the name of the sub-folder it lies in.

    Hidden files and folders and files without a picture's suffix are left out, and links to folders are not followed.
    Raises DataError when it is no folder or holds no picture.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; name a folder of pictures")
        self.files = sorted(_pictures_below(folder))
        if not self.files:
            raise DataError(f"no picture ({', '.join(PICTURE_SUFFIXES)}) in the folder {folder} or below it")
        labels = [None if file.parent == folder else file.parent.name for file in self.files]
        self.catalogue = Catalogue([str(file) for file in self.files], [()] * len(self.files), labels)

    def content(self, index: int) -> Path:
        """The file of picture `index`."""
        return self.files[index]

    def stamp(self) -> str:
        """Names, sizes and times of all files."""
        return stamp_of(self.files)


def _pictures_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES):
                yield Path(parent, name)
