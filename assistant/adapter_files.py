"""Read, write and merge LoRA adapters in peft's published layout, each tied to the very base it was trained on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import LlavaProcessor

from assistant.adapter_layouts import ADAPTER_CONFIG, PREFIX, read_adapter
from assistant.checkpoint import load_llava, save_llava
from assistant.hashing import weights_hash
from assistant.models import ModelError, find_model, read_json
from assistant.projectors import Llava
from assistant.weight_files import write_weights

ADAPTER = "adapter"  # the folder, inside a tuned model's, of the adapter that was merged into it
BASE = "base"  # the folder beside an adapter's of a base that was made for it
PROVENANCE = "provenance.json"
LANGUAGE_LAYERS = "model.language_model.layers."  # where an adapter may stand, and where vLLM serves it
NAME_IN_MODEL = ".default"  # peft's name of the one adapter, which stands in a model's names and not in the file
HIGHEST_RANK = 512  # of an adapter that vLLM serves beside its base


def save_adapter(
    config: LoraConfig,
    weights: Mapping[str, Tensor],
    base: Path,
    name: str,
    folder: Path,
    held_in: str | None = None,
) -> None:
    """Write an adapter that peft loads and vLLM serves, and say of which base it is.

    Args:
        config: what was injected.
        weights: the adapter's own, by their names in the model.
        base: the folder of the model it stands on.
        name: what a reader calls that model: its hub name, or its folder.
        folder: where it is written.
        held_in: `nf4` where the base was held in 4 bits while the adapter trained.

    Raises:
        ModelError: some of it stands on tower or projector.
    """
    elsewhere = _beside_language_layers(weights)
    if elsewhere is not None:
        raise ModelError(f"{folder}: {elsewhere}; train tower and projector whole, and they are baked into the base")
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = name
    config.inference_mode = True
    config.save_pretrained(str(folder))
    published = {PREFIX + key.replace(NAME_IN_MODEL, ""): value for key, value in weights.items()}
    write_weights(published, folder / SAFETENSORS_WEIGHTS_NAME)
    said = {"base": {"name": name, "weights_sha256": weights_hash(base), "held_in": held_in}}
    (folder / PROVENANCE).write_text(json.dumps(said, indent=2) + "\n")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def load_adapted(
    adapter: Path, base: Path | None = None, dtype: torch.dtype = torch.float32, **arguments: Any
) -> tuple[PeftModel, LlavaProcessor]:
    """The base with the adapter on it, not merged, and its processor; `arguments` as `load_llava` has them.

    `base` is the model it stands on, see `base_of`.
    Raises ModelError where the adapter cannot be read, is incomplete, hits no module of the base, or was trained on
    another one.
    """
    folder = base_of(adapter, base)
    check_base(adapter, folder)
    model, processor = load_llava(folder, dtype, **arguments)
    return with_adapter(model, adapter), processor


def base_of(adapter: Path, base: Path | None = None) -> Path:
    """The folder of the model that `adapter` stands on: `base`, else one beside the adapter, else the one it names.

    Raises ModelError where there is no adapter, or its base cannot be found.
    """
    if not is_adapter(adapter):
        raise ModelError(f"{adapter} holds no adapter: there is no {ADAPTER_CONFIG}")
    beside = adapter.parent / BASE
    named = base or (beside if beside.is_dir() else read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path"))
    if not named:
        raise ModelError(f"{adapter} does not name the base it was trained on; name it with --base")
    return find_model(named)


def check_base(adapter: Path, base: Path) -> None:
    """Raises ModelError where the adapter says by hash that it was trained on other weights than those of `base`."""
    expected = _said_of_base(adapter)
    if "weights_sha256" not in expected:
        return  # others' adapters say none: `unproven_base` tells, and shapes decide
    found = weights_hash(base)
    if found != expected["weights_sha256"]:
        raise ModelError(
            f"the adapter {adapter} was trained on {expected.get('name')} (weights {expected['weights_sha256'][:12]}), "
            f"and {base} holds others ({found[:12]}): its answers would be noise; name the base it was trained on"
        )


def unproven_base(adapter: Path) -> str | None:
    """What a person should know of an adapter that does not say by hash which base it was trained on."""
    if "weights_sha256" in _said_of_base(adapter):
        return None
    name = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "none"
    return f"{adapter} does not say by hash which base it was trained on; by name it is {name}. See that it is the one"


def was_held_in(adapter: Path) -> str | None:
    """`nf4` where the adapter was trained on a base in 4 bits and says so."""
    held: str | None = _said_of_base(adapter).get("held_in")
    return held


def _said_of_base(adapter: Path) -> dict[str, Any]:
    file = adapter / PROVENANCE
    said: dict[str, Any] = read_json(file).get("base", {}) if file.is_file() else {}
    return said


def why_only_merged(adapted: PeftModel) -> str | None:
    """Why vLLM cannot serve this adapter beside its base; None where it can. Merged into the base it is served."""
    config = adapted.peft_config["default"]
    if config.use_dora:
        return "it is DoRA, which vLLM does not serve"
    if config.modules_to_save:
        return f"it holds modules that were trained whole ({', '.join(config.modules_to_save)})"
    if config.lora_bias:
        return "it holds biases beside its matrices (lora_bias), which vLLM does not serve"
    rank = max([config.r, *config.rank_pattern.values()])
    if rank > HIGHEST_RANK:
        return f"its rank is {rank}, and vLLM serves up to {HIGHEST_RANK}"
    return _beside_language_layers(get_peft_model_state_dict(adapted, save_embedding_layers=False))


def _beside_language_layers(names: Iterable[str]) -> str | None:
    """What is wrong where one of the weights stands elsewhere than in a layer of the language model."""
    elsewhere = sorted(name for name in names if not name.removeprefix(PREFIX).startswith(LANGUAGE_LAYERS))
    if not elsewhere:
        return None
    return (
        f"an adapter may stand on the language model's layers alone, and this one holds {elsewhere[0]} "
        f"({len(elsewhere)} such weights): vLLM would drop them without a word"
    )


def with_adapter(model: Llava, adapter: Path) -> PeftModel:
    """`model` with the adapter of that folder on it. Raises ModelError where it does not fit, see `read_adapter`."""
    config, named = read_adapter(adapter, model)
    weights = {PREFIX + name: value for name, value in named.items()}
    try:
        adapted = PeftModel(model, config)
        # A model without weights gets those of the adapter as they are: there is no memory to copy them to.
        as_they_are = model.device.type == "meta"
        result: Any = set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=as_they_are)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{adapter}: the adapter does not load onto its base: {reason}") from error
    wrong = set(result.unexpected_keys) | (
        set(weights) ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    )
    if wrong:
        names = ", ".join(sorted(wrong)[:3])
        raise ModelError(f"{adapter}: the adapter is incomplete or of another model: {names}")
    return adapted


def merge_adapter(adapter: Path, target: Path, base: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Write base and adapter as one model into `target`; its logits equal those of the two, up to rounding in `dtype`.

    Raises ModelError as `load_adapted` does. `merging.merge` compares besides.
    """
    adapted, processor = load_adapted(adapter, base, dtype)
    save_llava(adapted.merge_and_unload(), processor, target)
