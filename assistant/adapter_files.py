"""Read, write and merge LoRA adapters in peft's published layout, each tied to the very base it was trained on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaProcessor

from assistant.checkpoint import load_llava, save_llava
from assistant.hashing import file_hash
from assistant.models import ModelError, find_model, read_json
from assistant.projectors import Llava

ADAPTER = "adapter"  # the folder, inside a tuned model's, of the adapter that was merged into it
BASE = "base"  # the folder beside an adapter's of a base that was made for it
ADAPTER_CONFIG = "adapter_config.json"
PROVENANCE = "provenance.json"
PREFIX = "base_model.model."  # what peft writes before the name of every weight
LANGUAGE_LAYERS = "model.language_model.layers."  # where an adapter may stand, and where vLLM serves it
NAME_IN_MODEL = ".default"  # peft's name of the one adapter, which stands in a model's names and not in the file


def weights_hash(folder: Path) -> str:
    """sha256 over the weights of the model in `folder`: of its one file, or of the hashes of its files in order."""
    hashes = [file_hash(file) for file in sorted(folder.glob("model*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def save_adapter(config: LoraConfig, weights: Mapping[str, Tensor], base: Path, name: str, folder: Path) -> None:
    """Write an adapter that peft loads and vLLM serves, and say of which base it is.

    Args:
        config: what was injected.
        weights: the adapter's own, by their names in the model.
        base: the folder of the model it stands on.
        name: what a reader calls that model: its hub name, or its folder.
        folder: where it is written.

    Raises:
        ModelError: some of it stands on tower or projector.
    """
    _check_language_alone(weights, folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = name
    config.inference_mode = True
    config.save_pretrained(str(folder))
    published = {PREFIX + key.replace(NAME_IN_MODEL, ""): value.contiguous() for key, value in weights.items()}
    save_file(published, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    said = {"base": {"name": name, "weights_sha256": weights_hash(base)}}
    (folder / PROVENANCE).write_text(json.dumps(said, indent=2) + "\n")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def load_adapted(
    adapter: Path, base: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PeftModel, LlavaProcessor]:
    """The base with the adapter on it, not merged, and its processor.

    `base` is the model it stands on; where None, one that lies beside the adapter, else the one that it names.
    Raises ModelError where the adapter is incomplete or stands on tower or projector, or the base is another than it
    was trained on.
    """
    if not is_adapter(adapter):
        raise ModelError(f"{adapter} holds no adapter: there is no {ADAPTER_CONFIG}")
    config = read_json(adapter / ADAPTER_CONFIG)
    beside = adapter.parent / BASE
    folder = find_model(base or (beside if beside.is_dir() else config.get("base_model_name_or_path")))
    check_base(adapter, folder)
    model, processor = load_llava(folder, dtype)
    return _with_adapter(model, adapter), processor


def check_base(adapter: Path, base: Path) -> None:
    """Raises ModelError where the adapter was trained on other weights than those of `base`."""
    file = adapter / PROVENANCE
    expected: dict[str, Any] = read_json(file).get("base", {}) if file.is_file() else {}
    if "weights_sha256" not in expected:
        raise ModelError(
            f"{adapter} does not say which base it was trained on: {PROVENANCE} has no base.weights_sha256"
        )
    found = weights_hash(base)
    if found != expected["weights_sha256"]:
        raise ModelError(
            f"the adapter {adapter} was trained on {expected.get('name')} (weights {expected['weights_sha256'][:12]}), "
            f"and {base} holds others ({found[:12]}): its answers would be noise; name the base it was trained on"
        )


def _check_language_alone(names: Iterable[str], adapter: Path) -> None:
    """Raises ModelError where one of the names stands elsewhere than in a layer of the language model."""
    elsewhere = sorted(name for name in names if not name.removeprefix(PREFIX).startswith(LANGUAGE_LAYERS))
    if elsewhere:
        raise ModelError(
            f"{adapter}: an adapter may stand on the language model's layers alone, and this one holds {elsewhere[0]} "
            f"({len(elsewhere)} such weights): vLLM would drop them without a word; train tower and projector whole, "
            "and they are baked into the base"
        )


def _with_adapter(model: Llava, adapter: Path) -> PeftModel:
    file = adapter / SAFETENSORS_WEIGHTS_NAME
    try:
        in_file = _names_in(file) if file.is_file() else set()
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{adapter}: the adapter does not load onto its base: {reason}") from error
    _check_language_alone(in_file, adapter)
    in_model = {
        PREFIX + name.removeprefix(PREFIX).replace(NAME_IN_MODEL, "")
        for name, _ in adapted.named_parameters()
        if NAME_IN_MODEL in name
    }
    if in_file != in_model:
        wrong = ", ".join(sorted(in_file ^ in_model)[:3]) or "no weights"
        raise ModelError(f"{adapter}: the adapter is incomplete or of another model: {wrong}")
    return adapted


def _names_in(file: Path) -> set[str]:
    with safe_open(file, "pt") as weights:
        return set(weights.keys())


def merge_adapter(adapter: Path, target: Path, base: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Write base and adapter as one model into `target`; its logits equal those of the two, up to rounding in `dtype`.

    Raises ModelError as `load_adapted` does.
    """
    adapted, processor = load_adapted(adapter, base, dtype)
    save_llava(adapted.merge_and_unload(), processor, target)
