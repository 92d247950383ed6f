"""Read and write checkpoints: the published key layout, complete folders, and where a named model is."""

import json
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

JOEY = Path(__file__).parent / "joey"
EMBEDDER = "embedder"  # the folder, inside a model's, of the tower with its text half
REQUIRED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class ModelError(ValueError):
    """A model that cannot be found or used; the message says what is wrong and the way out."""


def find_model(name: str | Path | None = None) -> Path:
    """The complete local folder of `name`: Joey where None, else a folder, else a model of the hub by its name.

    Raises ModelError when a file of the folder is missing, or the hub cannot be reached and holds no copy here.
    """
    if name is None:
        return require_complete(JOEY)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return require_complete(folder)
    if folder.exists():
        raise ModelError(f"{name} is a file; a model is a folder with config.json, weights and processor")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise ModelError(f"there is no folder {name}, and it is no hub name (those look like owner/model)")
    try:
        return require_complete(Path(snapshot_download(str(name), ignore_patterns=["*.bin", "*.pt", "*.pth", "*.py"])))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name} is not on this machine and the hub cannot be reached; "
            "check the network, or name a folder, or leave the name out to use Joey"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"the hub refused {name}: {str(error).splitlines()[0]}") from error


def require_complete(folder: Path) -> Path:
    """`folder`, when it holds all that an assistant needs. Raises ModelError naming every missing file."""
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        missing.append(PROCESSOR_FILES[0])
    missing += missing_weights(folder)
    if missing:
        raise ModelError(f"the model folder {folder} lacks {', '.join(missing)}; export or copy it again")
    return folder


def missing_weights(folder: Path) -> list[str]:
    """Names of weight files that `folder` should hold and does not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(name for name in shards if not (folder / name).is_file())
    return [] if (folder / "model.safetensors").is_file() else ["model.safetensors"]


def save_llava(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write `model` and `processor` in the layout that llava-hf publishes, readable by transformers and by vLLM."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = {published_key(key): value for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def published_key(key: str) -> str:
    """The name that llava-hf publishes for a key of transformers 5: CLIP and SigLIP towers have one level more."""
    return re.sub(
        r"^vision_tower\.(?!vision_model\.)(embeddings|encoder|post_layernorm|pre_layrnorm|head)\.",
        r"vision_tower.vision_model.\1.",
        key,
    )


def load_llava(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor of `folder`. Raises ModelError when a weight is missing, unexpected or of another shape."""
    model, report = LlavaForConditionalGeneration.from_pretrained(
        require_complete(folder), dtype=dtype, output_loading_info=True, local_files_only=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ModelError(
                f"{folder}: {problem.replace('_', ' ')}: {', '.join(map(str, sorted(report[problem])[:5]))}"
            )
    return model, LlavaProcessor.from_pretrained(folder, local_files_only=True)


def copy_model(source: Path, target: Path) -> None:
    """Replace `target` by a copy of the folder `source`."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
