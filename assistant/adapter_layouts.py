"""Read LoRA adapters in the names that any release of transformers gave to LLaVA's parts, or say why not."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from assistant.models import ModelError, read_json
from assistant.projectors import Llava

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # what peft writes before the name of every weight
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv2d)
# Names of modules, newest first: transformers 5, 4.52 and later, and before that, as llava-hf publishes them still.
LAYOUTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    ((r"^model\.vision_tower\.(?!vision_model\.)", "model.vision_tower.vision_model."),),
    (
        (r"^model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\b", "multi_modal_projector"),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\b", "language_model.lm_head"),
    ),
)
# Settings with which an adapter is more than matrices beside a linear layer, and what each means.
NOT_READ = {
    "alora_invocation_tokens": "it acts behind certain tokens alone (aLoRA), which no merged model can",
    "target_parameters": "it stands on bare parameters",
    "trainable_token_indices": "it trained single rows of the word embeddings",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it was trained with Megatron's own layers",
}
# Ways to start an adapter that take its first product out of the base: the published base is not the one it is for.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


def read_adapter(adapter: Path, model: Llava) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights of `adapter` in the names of `model`: full paths, and a rank and alpha for each.

    Weights are named as in `model`, without peft's prefix. Accepted are LoRA with rank and alpha patterns, rank
    stabilisation, DoRA, and modules that were trained whole (`modules_to_save`).

    Raises:
        ModelError: it is no LoRA or of a kind that is not read, incomplete, pickled, or stands on modules that `model`
            has not.
    """
    config = _config(adapter)
    weights = _weights(adapter)
    layout = next(
        (layout for layout in LAYOUTS if all(_older(_newer(name), layout) == name for name in weights)), LAYOUTS[0]
    )
    named = {_newer(name): value for name, value in weights.items()}
    found = {name.partition(".lora_")[0] for name in named if ".lora_" in name}
    _check_modules(adapter, config, found, model, layout)
    named = _without_copies(adapter, config, named, model)
    return _in_full(config, found, named, layout), named


def _config(adapter: Path) -> LoraConfig:
    said = read_json(adapter / ADAPTER_CONFIG)
    if said.get("peft_type") != "LORA":
        raise ModelError(f"{adapter} holds an adapter of the kind {said.get('peft_type')}, and LoRA alone is read here")
    for setting, meaning in NOT_READ.items():
        if said.get(setting):
            raise ModelError(f"{adapter}: {meaning} ({setting} in {ADAPTER_CONFIG}), which is not read here")
    if said.get("bias", "none") != "none":
        raise ModelError(f"{adapter}: it trained biases of the base (bias is {said['bias']!r}), which is not read here")
    start = str(said.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGE_THE_BASE):
        raise ModelError(
            f"{adapter}: it began by changing the base (init_lora_weights is {start!r}); save it again with peft's "
            "path_initial_model_for_weight_conversion, and it fits the published base"
        )
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{adapter}: {ADAPTER_CONFIG} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{adapter}: {ADAPTER_CONFIG} is of a {type(config).__name__}, and LoRA alone is read here")
    return config


def _weights(adapter: Path) -> dict[str, Tensor]:
    """By their names in the file, without peft's prefix."""
    file = adapter / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if (adapter / WEIGHTS_NAME).is_file():
            raise ModelError(
                f"{adapter} holds its weights pickled ({WEIGHTS_NAME}), which may run code; save it again with "
                "safe_serialization=True"
            )
        raise ModelError(f"{adapter}: the adapter is incomplete: there is no {SAFETENSORS_WEIGHTS_NAME}")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{adapter}: the adapter's weights are damaged ({error}); copy them again") from error
    if not weights:
        raise ModelError(f"{adapter}: the adapter is incomplete: it holds no weights")
    return {name.removeprefix(PREFIX): value for name, value in weights.items()}


def _newer(name: str) -> str:
    """The name that transformers 5 gives to a module or weight, whatever release named it."""
    for old, new in (
        (r"^language_model\.lm_head\b", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\b", r"model.\1"),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    ):
        name = re.sub(old, new, name)
    return name


def _older(name: str, layout: tuple[tuple[str, str], ...]) -> str:
    for new, old in layout:
        name = re.sub(new, old, name)
    return name


def _check_modules(
    adapter: Path, config: LoraConfig, found: set[str], model: Llava, layout: tuple[tuple[str, str], ...]
) -> None:
    """Raises ModelError unless the weights stand on exactly the modules of `model` that the configuration names."""
    there = {name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    if found and not found & there:
        raise ModelError(
            f"{adapter}: the adapter hits no module of this base: it stands on {min(found)} ({len(found)} such), and "
            f"the base has {min(there)}; name the base it was trained on"
        )
    meant = {name for name in there if check_target_module_exists(config, _older(name, layout))}
    if not meant and not found:
        raise ModelError(f"{adapter}: target_modules {config.target_modules!r} hits no module of this base")
    if found != meant:
        wrong = ", ".join(sorted(found ^ meant)[:3])
        raise ModelError(
            f"{adapter}: the adapter is incomplete or of another model: {len(found)} modules in its weights, "
            f"{len(meant)} by target_modules on this base; not in both: {wrong}"
        )


def _without_copies(adapter: Path, config: LoraConfig, named: Mapping[str, Tensor], model: Llava) -> dict[str, Tensor]:
    """The weights of LoRA and of modules that were trained whole.

    Where an adapter stands on words or head, peft saves the base's own beside it: copies are left out. Raises
    ModelError where such a weight is another than the base's.
    """
    whole = [re.compile(rf"(^|.*\.){_newer(name)}(\.|$)") for name in config.modules_to_save or ()]
    base = model.state_dict()  # tied weights by all their names
    kept = {}
    for name, value in named.items():
        if ".lora_" in name or any(pattern.match(name) for pattern in whole):
            kept[name] = value
            continue
        own = base.get(name.replace(".base_layer.", "."))
        if own is None or not torch.equal(own.cpu().to(value.dtype), value):
            raise ModelError(
                f"{adapter}: it holds {name}, which is no LoRA, is not named in modules_to_save, and is another than "
                "the base's (of a larger vocabulary?): it cannot be merged into this base"
            )
    return kept


def _in_full(
    config: LoraConfig, found: set[str], named: Mapping[str, Tensor], layout: tuple[tuple[str, str], ...]
) -> LoraConfig:
    """`config` with each module by its full path, and the rank and alpha of each."""
    alphas: dict[str, Any] = dict(config.alpha_pattern or {})
    config.rank_pattern = {
        name.partition(".lora_")[0]: value.shape[0]
        for name, value in named.items()
        if ".lora_A." in name or name.endswith(".lora_embedding_A")
    }
    keys = {name: get_pattern_key(list(alphas), _older(name, layout)) for name in found}
    config.alpha_pattern = {name: alphas.get(key, config.lora_alpha) for name, key in keys.items()}
    config.target_modules = set(found)  # type: ignore[assignment]  # as peft itself keeps them
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if config.modules_to_save:
        config.modules_to_save = [_newer(name) for name in config.modules_to_save]
    config.task_type = None
    config.inference_mode = True
    return config
