"""What the configuration in a model folder says about serving it."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from assistant.models import ModelError, read_json, require_complete

# What vLLM's own LLaVA knows. Any other tower (DINOv2, ViT), layout (Aya Vision, which holds our pixel-shuffle) or
# activation makes it stop, and is served by vLLM's transformers backend instead: the same answers at a lower speed.
LAYOUTS_OF_VLLM = frozenset({"llava", "llava_next"})
TOWERS_OF_VLLM = frozenset({"clip_vision_model", "siglip_vision_model", "pixtral"})
# What `assistant.checkpoint` reads, and adapters are made for.
LAYOUTS_TAUGHT = frozenset({"llava", "llava_next", "aya_vision"})
ACTIVATIONS_OF_VLLM = frozenset({"gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"})


@dataclass(frozen=True)
class ModelFacts:
    """What `config.json` says. `context_length` counts tokens and is None where the configuration does not say."""

    folder: Path
    tower: str | None
    read_by_vllm: bool  # by its own code; else vLLM runs transformers'
    context_length: int | None
    picture_token: str | None
    takes_adapters: bool = False  # whether some can be made for it here, and vLLM serves them beside it


def read_model_folder(folder: Path) -> ModelFacts:
    """What serving needs to know of the complete `folder`.

    Raises:
        ModelError: the folder or a file in it is missing or damaged, or vLLM lacks what reads its weights.
    """
    config = read_json(require_complete(folder) / "config.json")
    _check_quantisation(folder, config)
    text_config = config.get("text_config", config)
    return ModelFacts(
        folder=folder,
        tower=(tower := config.get("vision_config", {}).get("model_type")),
        read_by_vllm=config.get("model_type") in LAYOUTS_OF_VLLM
        and tower in TOWERS_OF_VLLM
        and config.get("projector_hidden_act", "gelu") in ACTIVATIONS_OF_VLLM,
        context_length=text_config.get("max_position_embeddings"),
        picture_token=_picture_token(folder, config),
        takes_adapters=config.get("model_type") in LAYOUTS_TAUGHT and "quantization_config" not in config,
    )


def _check_quantisation(folder: Path, config: dict[str, Any]) -> None:
    """vLLM 0.28 and later know nothing of bitsandbytes, and would call it an unknown method; it has a plugin."""
    method = config.get("quantization_config", {}).get("quant_method")
    if method == "bitsandbytes" and find_spec("vllm_bnb_plugin") is None:
        raise ModelError(
            f"{folder} holds weights of bitsandbytes. vLLM reads bitsandbytes' weights with vllm-bnb-plugin, which is "
            "not installed: `pip install vllm-bnb-plugin`, or export the model with --format int8"
        )


def _picture_token(folder: Path, config: dict[str, Any]) -> str | None:
    """The token that stands for a picture, which nobody may type: its id is in the configuration."""
    number = config.get("image_token_index", config.get("image_token_id"))
    added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    return next((token["content"] for token in added if token["id"] == number), None)
