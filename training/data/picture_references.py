"""Find the pictures that rows of conversations refer to: beside their file, in a folder, in data URLs, or by https."""

import hashlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from assistant.images import PictureError, decode_data_url
from assistant.remote_pictures import RemotePictures
from training.data.conversations import PictureReference, RowError

DOWNLOADS = Path("~/.cache/kangaroo/pictures")  # where fetched pictures are kept, for every data set


class PictureFinder:
    """Finds pictures relative to `base`, or to `folder` where one is given; https only where `remote` is.

    Without `paths` a picture is one that the rows hold themselves: what others wrote must not open files of ours.
    """

    def __init__(
        self, base: Path | None, folder: Path | None = None, remote: RemotePictures | None = None, paths: bool = True
    ) -> None:
        self.base, self.remote, self.paths = folder or base, remote, paths

    def content(self, reference: PictureReference) -> bytes | Path:
        """The bytes of a picture, or its file, which is there. Raises RowError where it cannot be had."""
        if reference.content is not None:
            return reference.content
        where = reference.where or ""
        try:
            if where.startswith("data:"):
                return decode_data_url(where)
            if self.paths and where.lower().startswith(("https://", "http://")):
                return self._fetched(reference.field, where)
        except PictureError as error:
            raise RowError(
                "damaged picture", reference.field, str(error).rstrip(".")[:300], "mend it or take it out"
            ) from error
        if not self.paths:
            way_out = "write the picture itself, as data:image/png;base64,..."
            raise RowError("missing picture", reference.field, f"it is no data URL, but {where[:60]!r}", way_out)
        return self._file(reference.field, where)

    def key(self, reference: PictureReference) -> str:
        """The same text for references that mean the same picture by the same name."""
        if reference.content is not None:
            return "bytes " + hashlib.sha256(reference.content).hexdigest()
        where = reference.where or ""
        return "data " + hashlib.sha256(where.encode(errors="replace")).hexdigest() if len(where) > 500 else where

    def path(self, where: str) -> Path:
        """The file that `where` names, be it there or not."""
        if where.lower().startswith("file://"):
            where = unquote(urlsplit(where).path)
        path = Path(where).expanduser()
        return path if path.is_absolute() or self.base is None else self.base / path

    def _fetched(self, field: str, url: str) -> Path:
        if self.remote is None:
            wrong = f"it is on the web: {url[:200]}"
            raise RowError("remote picture", field, wrong, "allow fetching with --allow-downloads, or bring the files")
        try:
            return self.remote.fetch(url)
        except PictureError as error:
            raise RowError(
                "remote picture", field, str(error).rstrip(".")[:300], "bring the file, or take the row out"
            ) from error

    def _file(self, field: str, where: str) -> Path:
        try:
            path = self.path(where)
            there = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            wrong = f"{where[:200]!r} is no path of a file"
            raise RowError("missing picture", field, wrong, "write the picture's path") from error
        if there:
            return path
        wrong = f"there is no file {path}"
        if path.is_dir():
            wrong = f"{path} is a folder"
        raise RowError("missing picture", field, wrong, "bring it, or say where pictures are with --pictures")
