"""What CLIP and SigLIP share: captioned views, the two halves of a model, and which texts say the same."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import (
    BaseImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerBase,
    SiglipModel,
    SiglipProcessor,
)

from assistant.embeddings import text_ids
from assistant.towers import Tower
from assistant.weight_files import write_model
from training.comparison import share_found
from training.data.pictures import DataError, Picture
from training.data.views import mirrors_safely, random_view, square
from training.objective import Start, Watched, WholeBatchObjective, check_side
from training.strict import Strict

MOST_TRUE = 24  # texts that may be true of one picture; a number for all, so that micro-batches and ranks agree


class PictureTextSettings(Strict):
    """What a recipe may say of both."""

    smallest_crop: float = Field(0.5, gt=0, le=1, description="smallest share of a picture's area in a view")
    start_temperature: float | None = Field(
        None, ge=1, description="what cosines are multiplied with at first; the model's own where unset"
    )


@dataclass(frozen=True)
class CaptionedView:
    """One view of a picture, uint8 (3, side, side), and one text that is true of it."""

    view: Tensor
    text: str
    also_true: tuple[str, ...] = ()


class PictureTextObjective(WholeBatchObjective):
    """Trains both halves of a CLIP or SigLIP; a subclass has the loss, and the text half's way to read."""

    processor_class: ClassVar[type[CLIPProcessor | SiglipProcessor]]
    masks_padding: ClassVar[bool]

    def __init__(
        self,
        model: CLIPModel | SiglipModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        side: int,
        smallest_crop: float,
    ) -> None:
        """`side`: pixels of a view, which may be fewer than the model's own. Raises ValueError where parts misfit."""
        super().__init__()
        words = model.config.text_config.vocab_size
        if len(tokenizer) > words:
            raise ValueError(f"the tokenizer has {len(tokenizer)} words and the model {words}; take the model's own")
        self.model = model
        self.tower = Tower(model.vision_model, image_processor)  # the same weights, and what it knows of them
        check_side(self.tower, side)
        self.tokenizer = tokenizer
        self.side = side
        self.smallest_crop = smallest_crop
        self.text_length = model.config.text_config.max_position_embeddings

    def sample(self, picture: Picture, generator: np.random.Generator) -> CaptionedView:
        """A random crop and one of the picture's texts; mirrored half the time, unless the text names a side.

        A picture whose texts are true of all of it only is not cropped.
        """
        if not picture.texts:
            raise DataError(
                f"{picture.name} has no text, and this objective trains on pictures with texts: "
                "give it a caption, or leave it out"
            )
        text = picture.texts[int(generator.integers(len(picture.texts)))]
        if picture.whole:
            return CaptionedView(square(picture.pixels, self.side), text, picture.also_true)
        mirror = mirrors_safely(text)
        view = random_view(picture.pixels, self.side, generator, self.smallest_crop, mirror)
        return CaptionedView(view, text, picture.also_true)

    def collate(self, samples: Sequence[CaptionedView]) -> Mapping[str, Tensor]:
        """views (B, 3, side, side) uint8, text_ids (B, T), identity (B,) int64: equal where texts are equal.

        Also true (B, MOST_TRUE): the identities of all texts that are true of each picture, its own first.
        """
        return {
            "views": torch.stack([sample.view for sample in samples]),
            "text_ids": text_ids(self.model, self.tokenizer, [sample.text for sample in samples]),
            "identity": torch.tensor([identity_of(sample.text) for sample in samples]),
            "true": torch.tensor([identities_true_of(sample) for sample in samples]),
        }

    def represent(self, **batch: Any) -> dict[str, Tensor]:
        """pictures and texts, (b, D) fp32 of unit length each, and the texts' identity (b,)."""
        pixels = self.tower.normalise(batch["views"])
        pictures = self.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
        texts = self.model.get_text_features(input_ids=batch["text_ids"]).pooler_output
        return {
            "pictures": functional.normalize(pictures.float(), dim=-1),
            "texts": functional.normalize(texts.float(), dim=-1),
            "identity": batch["identity"],
            "true": batch["true"],
        }

    def facts(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """For the log: the scale, and how often the best of this rank's texts is true of a picture, and vice versa."""
        pictures, texts = representations["pictures"].detach(), representations["texts"].detach()
        identity, true = representations["identity"], representations["true"]
        return {
            "scale": self.model.logit_scale.detach().exp(),
            "picture_finds_text": share_found(pictures, texts, true, identity, first_are_same=False),
            "text_finds_picture": share_found(texts, pictures, identity, true, first_are_same=False),
        }

    def trained_parameters(self) -> set[str]:
        """Everything: both halves, the temperature and, for SigLIP, the bias."""
        return {name for name, _ in self.named_parameters()}

    def watched(self, samples: int) -> Watched:
        """Both halves."""
        found = ("picture_finds_text", "text_finds_picture")
        return Watched(self.tower, model=self.model, tokenizer=self.tokenizer, finds=found)

    def layers_above(self, name: str) -> int:
        """Layers above a parameter in its own half; 0 for what stands on both."""
        vision, text = "model.vision_model.", "model.text_model."
        if name.startswith(vision):
            return len(self.tower.layers) + 1 - self.tower.layer_of(f"model.{name.removeprefix(vision)}")
        if not name.startswith(text):
            return 0
        layers = self.model.text_model.encoder.layers
        for number, layer in enumerate(layers):
            if any(f"{text}encoder.layers.{number}.{inner}" == name for inner, _ in layer.named_parameters()):
                return len(layers) - number
        return len(layers) + 1 if name.startswith(f"{text}embeddings.") else 0

    def export(self, folder: Path) -> None:
        """A plain `CLIPModel` or `SiglipModel` with its processor, loadable by transformers alone."""
        write_model(self.model, folder)
        self.processor().save_pretrained(folder)

    def processor(self) -> CLIPProcessor | SiglipProcessor:
        """The model's own image processor, and a tokenizer that pads texts as they were padded in training."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.model_max_length = self.text_length
        tokenizer.padding_side = "right"
        if not self.masks_padding:
            # Else a tokenizer that is not SigLIP's own gives transformers an attention mask, and other embeddings.
            tokenizer.model_input_names = ["input_ids"]
            tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
        return self.processor_class(self.tower.image_processor, tokenizer)


def identity_of(text: str) -> int:
    """64 bits that are the same for the same text, in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def identities_true_of(sample: CaptionedView) -> list[int]:
    """MOST_TRUE identities: of the sample's text, of all others that are true of it, and the first again for the rest.

    Raises DataError when there are more than MOST_TRUE.
    """
    texts = (sample.text, *sample.also_true)
    if len(texts) > MOST_TRUE:
        raise DataError(f"{len(texts)} texts are said to be true of one picture; {MOST_TRUE} is the most")
    identities = [identity_of(text) for text in texts]
    return identities + identities[:1] * (MOST_TRUE - len(identities))


def given_picture_text(start: Start, name: str, kind: type) -> tuple[Any, PreTrainedTokenizerBase, BaseImageProcessor]:
    """The model, tokenizer and image processor of `start`. Raises ValueError where one is missing or misfits."""
    if not isinstance(start.model, kind):
        given = "a tower alone" if start.model is None else f"a {type(start.model).__name__}"
        raise ValueError(f"{name} trains both halves of a {kind.__name__}, and {given} was given")
    if start.tokenizer is None or start.image_processor is None:
        raise ValueError(f"{name} needs the model's tokenizer and image processor beside it")
    return start.model, start.tokenizer, start.image_processor
