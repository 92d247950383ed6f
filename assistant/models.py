"""Find a model by name - Joey, a folder, or one of the hub - and see that its folder is complete."""

import json
import re
from pathlib import Path
from typing import Any

JOEY = Path(__file__).parent / "joey"
EMBEDDER = "embedder"  # the folder, inside a model's, of the tower with its text half
REQUIRED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")  # the second is the older way
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
PICKLED_WEIGHTS = "pytorch_model.bin"
# The same weights in formats that nobody here reads, and code, which no model may bring along.
NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx", "*.ot", "*.py"]


class ModelError(ValueError):
    """A model that cannot be found or used; the message says what is wrong and the way out."""


def find_model(name: str | Path | None = None) -> Path:
    """The complete local folder of `name`: Joey where None, else a folder, else a model of the hub by its name.

    Raises ModelError when a file of the folder is missing, or the hub cannot be reached and holds no copy here.
    """
    return require_complete(JOEY if name is None else local_folder(name))


def find_tower(name: str | Path) -> Path:
    """The local folder of `name`, a folder or a model of the hub, that holds a tower or a model with one in it.

    Weights may be pickled, as in OpenAI's older CLIPs: they are read without running code.
    Raises ModelError when config, weights or image processor are missing, or the hub cannot be reached.
    """
    folder = local_folder(name)
    if missing_weights(folder) and not Path(name).expanduser().is_dir():
        folder = downloaded(str(name), [PICKLED_WEIGHTS])
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / file).is_file() for file in PROCESSOR_FILES):
        missing.append(PROCESSOR_FILES[1])
    if not (folder / PICKLED_WEIGHTS).is_file():
        missing += missing_weights(folder)
    if missing:
        raise ModelError(f"the model folder {folder} lacks {', '.join(missing)}; export or copy it again")
    return folder


def local_folder(name: str | Path) -> Path:
    """The folder `name`, or where the model of the hub with that name lies on this machine, downloaded if need be.

    Where no folder is called so, `joey` is the one that ships; names of the hub have an owner before them.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if str(name) == JOEY.name:
        return JOEY
    if folder.exists():
        raise ModelError(f"{name} is a file; a model is a folder with config.json, weights and processor")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise ModelError(f"there is no folder {name}, and it is no hub name (those look like owner/model)")
    return downloaded(str(name))


def downloaded(name: str, only: list[str] | None = None) -> Path:
    """The folder on this machine with the files of the hub's model `name`, or with `only` these besides."""
    # Late, like everything slow: a page over a local folder is up before the hub's client would be.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=only, ignore_patterns=None if only else NOT_DOWNLOADED))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name} is not on this machine and the hub cannot be reached; check the network, or name a folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"the hub refused {name}: {str(error).splitlines()[0]}") from error


def require_complete(folder: Path) -> Path:
    """`folder`, when it holds all that an assistant needs.

    Raises ModelError naming every missing file, or the one that is not readable JSON.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds an adapter alone; merge it: kangaroo merge {folder} --out FOLDER")
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        missing.append(PROCESSOR_FILES[0])
    if not has_template(folder):
        missing.append(TEMPLATE_FILES[0])
    missing += missing_weights(folder)
    if missing:
        raise ModelError(f"the model folder {folder} lacks {', '.join(missing)}; export or copy it again")
    for name in REQUIRED_FILES:
        read_json(folder / name)
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises ModelError when it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged: not readable as JSON ({error}); export or copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is damaged: a JSON object was expected; export or copy it again")
    return content


def has_template(folder: Path) -> bool:
    """Whether a chat template travels with the weights: in a file of its own, or inside the tokenizer's settings."""
    settings = folder / "tokenizer_config.json"
    inside = settings.is_file() and "chat_template" in read_json(settings)
    return inside or any((folder / name).is_file() for name in TEMPLATE_FILES)


def missing_weights(folder: Path) -> list[str]:
    """Names of weight files that `folder` should hold and does not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json(index).get("weight_map", {}).values())
        return sorted(name for name in shards if not (folder / name).is_file())
    return [] if (folder / "model.safetensors").is_file() else ["model.safetensors"]
