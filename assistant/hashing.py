"""Name a file, or the weights of a model, by their content."""

import hashlib
from pathlib import Path


def file_hash(file: Path) -> str:
    """sha256 of the bytes of `file`, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_hash(folder: Path) -> str:
    """sha256 over the weights of the model in `folder`: of its one file, or of the hashes of its files in order."""
    hashes = [file_hash(file) for file in sorted(folder.glob("model*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
