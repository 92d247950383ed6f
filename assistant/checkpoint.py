"""Read and write checkpoints in the key layouts that are published for LLaVA, LLaVA-NeXT and Aya Vision."""

import json
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    SiglipVisionModel,
)

from assistant.models import EMBEDDER, ModelError, missing_weights, read_json, require_complete
from assistant.projectors import Llava
from assistant.tiles import Processor
from assistant.weight_files import write_model, write_weights

Model = TypeVar("Model", bound=PreTrainedModel)
LAYOUTS: dict[str, type[Llava]] = {
    LlavaConfig.model_type: LlavaForConditionalGeneration,
    LlavaNextConfig.model_type: LlavaNextForConditionalGeneration,
    AyaVisionConfig.model_type: AyaVisionForConditionalGeneration,
}
ONE_FILE = "1TB"  # whatever reads and converts our checkpoints finds all weights in one place


def save_llava(model: Llava, processor: Processor, folder: Path) -> None:
    """Write `model` and `processor` in the layout that is published for them, readable by transformers and by vLLM."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(model, folder, max_shard_size=ONE_FILE)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    if isinstance(model.model.vision_tower, CLIPVisionModel | SiglipVisionModel):
        weights = {published_key(key): value for key, value in load_file(file).items()}
        write_weights(weights, file)


def published_key(key: str) -> str:
    """The name that llava-hf publishes for a key of transformers 5 with a CLIP or SigLIP tower: one level more."""
    return re.sub(
        r"^vision_tower\.(?!vision_model\.)(embeddings|encoder|post_layernorm|pre_layrnorm|head)\.",
        r"vision_tower.vision_model.\1.",
        key,
    )


def load_llava(folder: Path, dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Llava, Processor]:
    """Model and processor of `folder`; `arguments` are transformers' own, such as a quantisation.

    The model is a LlavaNextForConditionalGeneration where it reads tiles, and an AyaVisionForConditionalGeneration
    where the projector is a pixel-shuffle; all have the same parts.
    Raises ModelError when it is of another layout, or a weight is missing, unexpected or of another shape.
    """
    model = load_model(LAYOUTS[layout_of(folder)], folder, dtype, others_allowed=False, **arguments)
    processor = load_processor(folder)
    if processor.tokenizer.chat_template is None:  # older models keep it with the processor alone
        processor.tokenizer.chat_template = processor.chat_template
    return model, processor


def load_processor(folder: Path) -> Processor:
    """The processor of `folder`. Raises ModelError when the model is of another layout."""
    tiled = layout_of(folder) == LlavaNextConfig.model_type
    return (LlavaNextProcessor if tiled else LlavaProcessor).from_pretrained(folder, local_files_only=True)


def layout_of(folder: Path) -> str:
    """Which of `LAYOUTS` the complete `folder` is in. Raises ModelError when it is another."""
    kind = read_json(require_complete(folder) / "config.json").get("model_type")
    if kind not in LAYOUTS:
        raise ModelError(f"{folder} holds a {kind}, and these can be taught and asked here: {', '.join(LAYOUTS)}")
    return str(kind)


def load_model(
    model_class: type[Model],
    folder: Path,
    dtype: torch.dtype = torch.float32,
    others_allowed: bool = True,
    **arguments: Any,
) -> Model:
    """The model of `folder` as a `model_class`, made with `arguments`. Runs no code of the checkpoint.

    Raises ModelError when the weights are damaged, or one is missing or of another shape, or, unless `others_allowed`,
    when there are others than the model has (a classifier on top of a tower, for example).
    """
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=not missing_weights(folder),
            weights_only=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            **arguments,
        )
    except (SafetensorError, UnpicklingError) as error:
        raise ModelError(f"{folder}: the weights are damaged ({error}); export or copy them again") from error
    for problem in ("missing_keys", "mismatched_keys") + (() if others_allowed else ("unexpected_keys",)):
        if report[problem]:
            raise ModelError(
                f"{folder}: {problem.replace('_', ' ')}: {', '.join(map(str, sorted(report[problem])[:5]))}"
            )
    return model


def convert_weights(folder: Path, dtype: Literal["float32", "bfloat16", "float16"]) -> None:
    """Store the weights of `folder` as `dtype` (bfloat16 halves them), and say so in its config."""
    file = folder / "model.safetensors"
    weights = {key: value.to(getattr(torch, dtype)) for key, value in load_file(file).items()}
    write_weights(weights, file)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part["dtype"] = dtype
        part.pop("_name_or_path", None)  # where it lay on the machine that trained it is nobody's business
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def keep_embedder(source: Path, target: Path) -> None:
    """Copy the embedder beside the model in `source` to the one in `target`, where there is one.

    It is a model of its own, so whatever the other one is taught, it still finds and names pictures.
    """
    if (source / EMBEDDER).is_dir():
        copy_model(source / EMBEDDER, target / EMBEDDER)


def copy_model(source: Path, target: Path) -> None:
    """Replace `target` by a copy of the folder `source`."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
