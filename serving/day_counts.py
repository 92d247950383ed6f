"""Keep what keys have used today in a file beside theirs, so that a restart of the server gives nobody a second day."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.keys import KeyFileError, write_whole

SECONDS_BETWEEN_WRITES = 5.0

log = logging.getLogger("kangaroo.keys")


class Counts(BaseModel):
    """Of one key, in one day of UTC."""

    model_config = ConfigDict(extra="forbid")

    tokens: Annotated[int, Field(ge=0)] = 0
    pictures: Annotated[int, Field(ge=0)] = 0


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    day: int  # since 1970
    keys: dict[str, Counts]


class DayCounts:
    """The file, for one server alone: two servers with the same file of keys count each for itself, and the last wins.

    It is written at most every `SECONDS_BETWEEN_WRITES` seconds and at the end, so a server that is killed forgets no
    more than these. Where it cannot be written (the disk is full), that is logged, and counting goes on in memory.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._written = -SECONDS_BETWEEN_WRITES
        self._failed = False

    def read(self, day: int) -> dict[str, Counts]:
        """What was counted on `day`: nothing where there is no file, or one of another day.

        Raises KeyFileError where it cannot be read: going on from nothing would give everybody a second day.
        """
        try:
            content = _Content.model_validate_json(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise KeyFileError(f"{self.file} cannot be read: {error.strerror}.") from error
        except ValidationError as error:
            raise KeyFileError(f"{self.file} is damaged; remove it to count this day anew.") from error
        return content.keys if content.day == day else {}

    def is_due(self) -> bool:
        """Whether the last write is long enough ago."""
        return time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES

    def write(self, day: int, keys: Mapping[str, Counts]) -> None:
        """Put these in the place of what the file holds."""
        self._written = time.monotonic()
        try:
            write_whole(self.file, _Content(day=day, keys=dict(keys)).model_dump_json() + "\n")
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("What keys have used today is not kept: %s cannot be written: %s.", self.file, error.strerror)
            self._failed = True


def file_of_counts(key_file: Path) -> Path:
    """Where the counts of the keys in `key_file` are kept."""
    return key_file.with_name(f"{key_file.stem}.used-today.json")
