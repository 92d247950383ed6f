"""The pictures of a task, each decoded once, however many questions and models ask for it."""

import hashlib
from pathlib import Path
from threading import Lock

from PIL import Image

from assistant.hashing import file_hash
from assistant.images import PictureError, open_picture
from training.data.pictures import DataError

MEMORY = 2 * 2**30  # bytes of pixels that are kept


class TaskPictures:
    """Pictures by place; pixels stay in memory while there is room.

    Questions about one picture stand together, so where there is no room left a picture is still decoded once a model.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.names: list[str] = []
        self.decoded = 0  # how often a picture was decoded
        self._contents: list[bytes | Path | Image.Image] = []
        self._kept: dict[int, Image.Image] = {}
        self._last: tuple[int, Image.Image] | None = None
        self._room = memory
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, content: bytes | Path | Image.Image) -> int:
        """Take in a picture - encoded, a file, or drawn already - and give its place; `name` is for errors."""
        self.names.append(name)
        self._contents.append(content)
        return len(self.names) - 1

    def __getitem__(self, place: int) -> Image.Image:
        """The picture, RGB. Raises DataError naming it where it cannot be read."""
        with self._lock:
            return self._kept[place] if place in self._kept else self._decode(place)

    def _decode(self, place: int) -> Image.Image:
        content = self._contents[place]
        if isinstance(content, Image.Image):
            return content
        if self._last is not None and self._last[0] == place:
            return self._last[1]
        try:
            picture = open_picture(content, name=self.names[place])
        except PictureError as error:
            raise DataError(str(error)) from error
        self.decoded += 1
        size = 3 * picture.width * picture.height
        if size <= self._room:
            self._room -= size
            self._kept[place] = picture
        self._last = place, picture
        return picture

    def sha256(self, place: int) -> str:
        """The hash of the encoded picture, or of the pixels of one that was drawn."""
        content = self._contents[place]
        if isinstance(content, Path):
            return file_hash(content)
        return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).hexdigest()
