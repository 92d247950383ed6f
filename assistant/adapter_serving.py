"""Check that vLLM can serve an adapter beside its base, and write the copy of it that vLLM is to read."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig

from assistant.adapter_files import PROVENANCE, check_base, is_adapter, unproven_base, why_only_merged, with_adapter
from assistant.adapter_layouts import ADAPTER_CONFIG, PREFIX, read_adapter
from assistant.checkpoint import LAYOUTS, layout_of
from assistant.models import ModelError
from assistant.projectors import Llava
from assistant.weight_files import write_weights


@dataclass(frozen=True)
class ServableAdapter:
    """What was written: on how many modules the adapter stands, and its highest rank.

    `warning` is for people, where nothing proves that the base is the one it was trained on.
    """

    modules: int
    rank: int
    warning: str | None


def write_servable(adapter: Path, base: Path, target: Path) -> ServableAdapter:
    """Write `adapter` into the new folder `target`, every module by its full path and newest name.

    vLLM takes an adapter that hits nothing, or holds parts for tower and projector, without a word; here each module
    is looked for in the base. Of the base only the configuration is read, and the hash of its weights where the adapter
    names one.

    Raises:
        ModelError: there is no adapter or a damaged one, it is of another base, or vLLM serves it only when merged.
    """
    if not is_adapter(adapter):
        raise ModelError(f"{adapter} holds no adapter: there is no {ADAPTER_CONFIG}")
    check_base(adapter, base)
    model = without_weights(base)
    config, named = read_adapter(adapter, model)
    for name, value in named.items():
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"{adapter}: {name} holds values that are no numbers; the training that made it diverged")
    reason = why_only_merged(with_adapter(model, adapter))
    if reason is not None:
        raise ModelError(f"{adapter} cannot be served beside its base: {reason}; merge it (kangaroo merge)")
    target.mkdir(parents=True)
    config.save_pretrained(str(target))
    write_weights({PREFIX + name: value for name, value in named.items()}, target / SAFETENSORS_WEIGHTS_NAME)
    if (adapter / PROVENANCE).is_file():
        shutil.copyfile(adapter / PROVENANCE, target / PROVENANCE)
    ranks = [value.shape[0] for name, value in named.items() if ".lora_A." in name]
    return ServableAdapter(modules=len(ranks), rank=max(ranks), warning=unproven_base(adapter))


def without_weights(folder: Path) -> Llava:
    """The model of `folder` with names and shapes and no memory for its weights."""
    kind = LAYOUTS[layout_of(folder)]
    with torch.device("meta"):
        model: Llava = kind(AutoConfig.from_pretrained(folder, local_files_only=True))
    return model
