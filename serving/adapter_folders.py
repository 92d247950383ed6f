"""Find adapters below the server's own folder of them, and nowhere else."""

from collections.abc import Iterator
from pathlib import Path

# As `assistant.adapter_files` and `assistant.adapter_layouts` have them, which import torch.
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INSIDE_A_TUNED_MODEL = ("", "adapter", "model/adapter")  # `kangaroo tune` leaves it inside of what it makes


class FolderError(ValueError):
    """There is no adapter there; the message says why, and holds no path but the one that was asked for."""


def adapter_in(folder: Path) -> Path | None:
    """The folder of the adapter in `folder`: itself, or one inside where it holds what `kangaroo tune` made."""
    return next(
        (folder / inside for inside in INSIDE_A_TUNED_MODEL if (folder / inside / ADAPTER_CONFIG).is_file()), None
    )


def adapter_below(root: Path, asked: str) -> Path:
    """The folder of the adapter `asked` for, a path from `root`. No link and no `..` leads out of `root`.

    Raises:
        FolderError: there is none.
    """
    if "\0" in asked or Path(asked).is_absolute() or ".." in Path(asked).parts:
        raise FolderError(f"{asked!r} is no path below the server's folder of adapters")
    inside = root.resolve()
    try:
        found = adapter_in(inside / asked)
    except OSError as error:  # a name too long for the file system
        raise FolderError(f"{asked!r} cannot be looked for: {error.strerror}") from error
    if found is None:
        raise FolderError(f"there is no adapter in {asked!r} (no {ADAPTER_CONFIG})")
    for file in (found / ADAPTER_CONFIG, found / WEIGHTS):
        if not file.resolve().is_relative_to(inside):
            raise FolderError(f"{asked!r} leads out of the server's folder of adapters")
    return found


def named_adapter(text: str) -> tuple[str, Path]:
    """Name and folder out of NAME=FOLDER. Raises FolderError where it is not that, or the folder holds no adapter."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise FolderError(f"{text!r} names no adapter: write NAME=FOLDER")
    found = adapter_in(Path(folder).expanduser())
    if found is None:
        raise FolderError(f"there is no adapter in {folder} (no {ADAPTER_CONFIG})")
    return name, found.resolve()


def adapters_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each adapter that lies directly in `root`, by name. Raises FolderError where it is none."""
    if not root.is_dir():
        raise FolderError(f"there is no folder {root}")
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and (found := adapter_in(path)) is not None:
            yield path.name, found.resolve()
