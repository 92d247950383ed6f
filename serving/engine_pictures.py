"""Hand a safe picture to the engine: as a file in memory where it runs beside us, else within the request."""

import hashlib
import logging
import secrets
import shutil
import tempfile
import threading
import uuid
from pathlib import Path

import pybase64
from PIL import Image

from assistant.images import encode_bitmap_url, encode_data_url, save_for_neighbour

SHARED_MEMORY = Path("/dev/shm")  # files that are memory, and never reach a disk
# Kept free for vLLM, whose processes share memory there, and end without a word where none is left. A container has
# 64 MB unless told otherwise: then no picture becomes a file.
ROOM_FOR_OTHERS = 256 * 2**20
SMALL_BITMAP = 3_000_000  # bytes
MOST_UNPACKING = 16  # times the length of the file that was sent
SECRET = secrets.token_bytes(32)  # of this process

log = logging.getLogger("kangaroo.pictures")


class EnginePicture:
    """A picture as the engine gets it: `url`, which takes `size` bytes of memory, and `name`, the same for its like.

    It was opened and saved anew, or is a plain JPEG that the engine is the first to open (`is_unopened`). The file
    behind `url`, where there is one, lasts until all who hold the picture let go of it; whoever makes one holds it.
    """

    def __init__(self, name: str, url: str, size: int, file: Path | None = None, is_unopened: bool = False) -> None:
        self.name = name
        self.url = url
        self.size = size
        self.is_unopened = is_unopened
        self._file = file
        self._holders = 1
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Need it until `let_go`."""
        with self._lock:
            self._holders += 1

    def let_go(self) -> None:
        """Need it no more."""
        with self._lock:
            self._holders -= 1
            if self._holders == 0 and self._file is not None:
                # The supervisor of an engine that has ended may have removed it.
                self._file.unlink(missing_ok=True)


def name_of(source: bytes) -> str:
    """What only this picture is called, and only by us: nobody else can give its name to another one at an engine."""
    # SHA-256 is computed in hardware, at three times the speed of BLAKE2.
    digest = hashlib.sha256(SECRET)
    digest.update(source)
    return digest.hexdigest()


def new_picture_folder(memory: Path = SHARED_MEMORY) -> Path | None:
    """A new folder in memory for this user alone; None where the machine has no such place, or little room in it."""
    if not memory.is_dir() or not has_room(memory, 0):
        return None
    return Path(tempfile.mkdtemp(prefix="kangaroo-pictures-", dir=memory))


def has_room(folder: Path, size: int) -> bool:
    """Whether `size` bytes more leave enough for others. Raises OSError where the folder is gone."""
    return shutil.disk_usage(folder).free >= size + ROOM_FOR_OTHERS


def picture_for_engine(name: str, image: Image.Image, file_bytes: int, folder: Path | None) -> EnginePicture:
    """The RGB picture with every pixel as it is; `file_bytes` is the length of the file that it came from.

    A file in `folder` spares both servers a megabyte of text, and its parsing. A PNG of 640 x 640 pixels takes 35 ms
    to write and the engine 12 ms to read, on the cores that generate; a bitmap takes half a millisecond for either.
    Only a picture that is large, and much larger than its file, is a PNG all the same, which is small then too: or
    short bodies could fill the memory.
    """
    bitmap = 3 * image.width * image.height
    kind = "bmp" if bitmap <= max(SMALL_BITMAP, MOST_UNPACKING * file_bytes) else "png"
    try:
        if folder is not None and has_room(folder, bitmap):
            return _as_file(name, image, folder / f"{uuid.uuid4().hex}.{kind}")
    except OSError as error:
        # The engine may have ended just now, and its folder with it.
        log.warning("A picture goes within its request, for it cannot be written into %s: %s.", folder, error.strerror)
    url = encode_bitmap_url(image) if kind == "bmp" else encode_data_url(image)
    return EnginePicture(name, url, len(url))


def plain_jpeg(name: str, content: bytes) -> EnginePicture:
    """The file as it was sent, for the engine decodes it as we would: it is small, and is decoded once, not twice."""
    url = "data:image/jpeg;base64," + pybase64.b64encode_as_string(content)
    return EnginePicture(name, url, len(url), is_unopened=True)


def _as_file(name: str, image: Image.Image, file: Path) -> EnginePicture:
    save_for_neighbour(image, file)
    return EnginePicture(name, file.as_uri(), file.stat().st_size, file)
