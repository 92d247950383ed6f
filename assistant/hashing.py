"""Name a file by its content."""

import hashlib
from pathlib import Path


def file_hash(file: Path) -> str:
    """sha256 of the bytes of `file`, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
