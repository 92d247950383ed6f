"""Read a folder of pictures, in sub-folders that name their labels where there are any."""

from pathlib import Path

from assistant.picture_files import PICTURE_SUFFIXES, pictures_below
from training.data.catalogue import Catalogue, stamp_of
from training.data.pictures import DataError


class FolderPictures:
    """Every picture below `folder`, in the order of their paths; the label is the name of the sub-folder it lies in.

    Hidden files and folders and files without a picture's suffix are left out, and links to folders are not followed.
    Raises DataError when it is no folder or holds no picture.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; name a folder of pictures")
        self.files = sorted(pictures_below(folder))
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
