"""What a model folder must hold to be served, and what its configuration says about serving it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class ModelFolderError(ValueError):
    """A model folder that cannot be served; the message names the file at fault."""


@dataclass(frozen=True)
class ModelFacts:
    """What `config.json` says. `context_length` counts tokens and is None where the configuration does not say."""

    folder: Path
    tower: str | None
    context_length: int | None
    picture_token: str | None


def read_model_folder(folder: Path) -> ModelFacts:
    """Check that every file is there and read what serving needs to know.

    Raises:
        ModelFolderError: the folder or a file in it is missing or is not readable JSON.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: there is no such model folder.")
    config = _read_json(folder / "config.json")
    _read_json(folder / "tokenizer.json")
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise _missing(folder / PROCESSOR_FILES[0])
    _check_weights(folder)
    text_config = config.get("text_config", config)
    return ModelFacts(
        folder=folder,
        tower=config.get("vision_config", {}).get("model_type"),
        context_length=text_config.get("max_position_embeddings"),
        picture_token=_picture_token(folder, config),
    )


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise _missing(folder / "model.safetensors")
        return
    for name in sorted(set(_read_json(index).get("weight_map", {}).values())):
        if not (folder / name).is_file():
            raise _missing(folder / name)


def _picture_token(folder: Path, config: dict[str, Any]) -> str | None:
    """The token that stands for a picture, which nobody may type: its id is in the configuration."""
    number = config.get("image_token_index", config.get("image_token_id"))
    added = _read_json(folder / "tokenizer.json").get("added_tokens", [])
    return next((token["content"] for token in added if token["id"] == number), None)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _missing(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{path}: not readable as JSON; the file is damaged ({error}).") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path}: a JSON object was expected.")
    return content


def _missing(path: Path) -> ModelFolderError:
    return ModelFolderError(f"{path} is missing. The model folder is not complete: copy or export the model again.")
