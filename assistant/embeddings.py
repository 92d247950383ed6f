"""The space that pictures and texts share: embed either with a CLIP or SigLIP and the processor saved beside it."""

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
)

from assistant.checkpoint import load_model
from assistant.hashing import file_hash
from assistant.models import EMBEDDER, PROCESSOR_FILES, ModelError, find_tower, read_json
from assistant.pixels import processed
from assistant.towers import Tower

TEXTS_AT_ONCE = 256
LENGTH_MULTIPLE = 16  # tokens; each new length of a batch costs a CPU some kernel preparation
# By what `config.json` says the weights are of.
WITH_TEXT_HALF: dict[str, type[CLIPModel | SiglipModel]] = {
    CLIPConfig.model_type: CLIPModel,
    SiglipConfig.model_type: SiglipModel,
}


class Embedder:
    """A CLIP or SigLIP with its tokenizer and image processor, for use and not for training.

    Pictures and texts become points of unit length; what belongs together lies close.
    """

    def __init__(
        self,
        model: CLIPModel | SiglipModel,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
    ) -> None:
        """`folder` is where all of it was loaded from."""
        self.folder = folder
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tower = Tower(model.vision_model, image_processor).eval()  # the same weights

    @cached_property
    def key(self) -> str:
        """Another one for other weights or another image processor: what was embedded is kept under it."""
        return tower_key(self.folder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device

    @torch.inference_mode()
    def pictures(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """(B, D) of unit length from B pictures, uint8 (3, H, W) of any sizes; the image processor resizes them."""
        pixels = processed(self.tower.image_processor, views)
        return self.of_pooled(self.tower(pixels.to(self.device)).pooled)

    @torch.inference_mode()
    def of_pooled(self, pooled: Tensor) -> Tensor:
        """(B, D) of unit length from what the tower pooled: CLIP projects it first, SigLIP's head has done so."""
        if isinstance(self.model, CLIPModel):
            pooled = self.model.visual_projection(pooled)
        return functional.normalize(pooled.float(), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(B, D) of unit length; a text that is too long for the text half is cut."""
        embedded = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            ids = text_ids(self.model, self.tokenizer, texts[start : start + TEXTS_AT_ONCE]).to(self.device)
            embedded.append(self.model.get_text_features(input_ids=ids).pooler_output)
        return functional.normalize(torch.cat(embedded).float(), dim=-1)


def text_ids(model: CLIPModel | SiglipModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """(B, T) ids as the text half of `model` reads them: padded on the right, cut where too long, no attention mask.

    SigLIP pools at its last place and was trained to read the padding, so T is always its full length. CLIP looks back
    only and pools at the end token, so padding is nothing to it: T is the longest text's, rounded up.
    """
    most = model.config.text_config.max_position_embeddings
    encoded = tokenizer(
        list(texts),
        padding="longest" if isinstance(model, CLIPModel) else "max_length",
        padding_side="right",
        truncation=True,
        max_length=most,
        return_tensors="pt",
    )
    ids = encoded["input_ids"]
    length = min(math.ceil(ids.shape[1] / LENGTH_MULTIPLE) * LENGTH_MULTIPLE, most)
    return functional.pad(ids, (0, max(0, length - ids.shape[1])), value=tokenizer.pad_token_id)


def has_text_half(folder: Path) -> bool:
    """Whether the model in `folder` is one that `load_embedder` loads."""
    return read_json(folder / "config.json").get("model_type") in WITH_TEXT_HALF


def load_embedder(source: str | Path) -> Embedder:
    """The CLIP or SigLIP in `source`, a folder or a hub name, in float32.

    Raises ModelError where it cannot be found, has no text half, or is damaged.
    """
    folder = find_tower(source)
    if not has_text_half(folder):
        kind = read_json(folder / "config.json").get("model_type")
        raise ModelError(
            f"{source} holds a {kind}, which has no text half that shares its space; take a CLIP or SigLIP with both "
            f"halves (a trained model keeps one in its folder {EMBEDDER})"
        )
    model = load_model(WITH_TEXT_HALF[read_json(folder / "config.json")["model_type"]], folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the processor cannot be read: {str(error).splitlines()[0]}") from error
    return Embedder(model, image_processor, tokenizer, folder)


def tower_key(folder: Path) -> str:
    """sha256 over the weights and the settings of the image processor in `folder`: all that its output hangs on.

    `folder` is any that `find_tower` gives, with a text half or without.
    """
    files = [*weight_files(folder), *(folder / name for name in (*PROCESSOR_FILES, "config.json"))]
    return hashlib.sha256("".join(file_hash(file) for file in files if file.is_file()).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in `folder`: safetensors, then pickled ones, each in the order of their names."""
    return [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
