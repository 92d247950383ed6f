"""Keys that open the API: made once, kept as hashes in one file, listed and revoked by name."""

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

NAME = r"^[A-Za-z0-9._-]{1,64}$"
SECONDS_BETWEEN_LOOKS = 1.0

log = logging.getLogger("kangaroo.keys")

Count = Annotated[int, Field(ge=1)] | None


class KeyLimits(BaseModel):
    """What a key may use; None is no limit. Days are those of UTC."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_a_minute: Count = None
    running: Count = None
    tokens_a_day: Count = None
    pictures_a_day: Count = None


NO_LIMITS = KeyLimits()


class Key(BaseModel):
    """A key as it is kept: its name, and the SHA-256 of its text.

    A plain hash is enough: the text has 256 random bits, so there is nothing to guess that a slow hash would protect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: datetime
    limits: KeyLimits = NO_LIMITS


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key]


class KeyFileError(ValueError):
    """The file of keys cannot be used, or holds no such name; the message says what to do."""


def default_key_file() -> Path:
    """Where keys are kept where nobody says otherwise."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "kangaroo" / "keys.json"


def new_key(file: Path, name: str, limits: KeyLimits = NO_LIMITS) -> str:
    """Make a key and note it in `file`; the text of the key, which is kept nowhere.

    Raises:
        KeyFileError: the name is taken or not a name, or the file is damaged or cannot be written.
    """
    if not re.match(NAME, name):
        raise KeyFileError(f"{name!r} is no name for a key: use up to 64 letters, digits, dots, dashes.")
    text = f"kangaroo-{secrets.token_urlsafe(32)}"
    with _changing(file) as keys:
        if any(key.name == name for key in keys):
            raise KeyFileError(f"There is a key named {name} already; revoke it, or choose another name.")
        created = datetime.now(UTC).replace(microsecond=0)
        keys.append(Key(name=name, digest=digest_of(text), created=created, limits=limits))
    return text


def revoke_key(file: Path, name: str) -> None:
    """Take the key out of `file`. Raises KeyFileError where there is none of this name."""
    with _changing(file) as keys:
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise KeyFileError(f"There is no key named {name} (there are: {known}).")
        keys[:] = left


def read_keys(file: Path) -> list[Key]:
    """The keys in `file`, in the order they were made. Raises KeyFileError where it is missing or damaged."""
    try:
        return _Content.model_validate_json(file.read_bytes()).keys
    except FileNotFoundError as error:
        raise KeyFileError(f"There is no file of keys at {file}; `kangaroo key new NAME` makes one.") from error
    except OSError as error:
        raise KeyFileError(f"{file} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "the whole"
        raise KeyFileError(
            f"{file} is damaged ({place}: {fault['msg']}); mend it, or remove it and start anew."
        ) from error


def digest_of(text: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@contextmanager
def _changing(file: Path) -> Iterator[list[Key]]:
    """The keys of `file` to be changed, alone; written whole, readable by its owner only, when all went well."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            keys = read_keys(file) if file.exists() else []
            yield keys
            write_whole(file, _Content(keys=keys).model_dump_json(indent=1) + "\n")
        finally:
            os.close(folder)
    except OSError as error:
        raise KeyFileError(f"{file} cannot be written: {error.strerror}.") from error


def write_whole(file: Path, text: str) -> None:
    """Put `text` in the place of `file`, all or nothing, for its owner alone to read. Raises OSError."""
    partial = tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False)  # noqa: SIM115 - made with mode 0600
    try:
        with partial:
            partial.write(text)
            partial.flush()
            os.fsync(partial.fileno())
        Path(partial.name).replace(file)
    except OSError:
        Path(partial.name).unlink(missing_ok=True)
        raise


class KeyRing:
    """The keys of a running server, which follow their file: a key that is revoked stops working within a second.

    Once there is a file, a key is wanted: one that is emptied, damaged or removed meanwhile opens nothing.
    """

    def __init__(self, file: Path) -> None:
        """Raises KeyFileError where the file is missing or damaged."""
        self.file = file
        self._keys = read_keys(file)
        self._seen = self._stamp()
        self._looked = time.monotonic()

    def find(self, text: str) -> Key | None:
        """The key with this text. Every key is compared, each in constant time."""
        self._follow()
        digest = digest_of(text)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _follow(self) -> None:
        if time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = read_keys(self.file)
        except KeyFileError as error:
            self._keys = []
            log.error("No key is accepted: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self.file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
