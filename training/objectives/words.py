"""Pretraining by naming: patches name the words that were said of their picture, and of their region of it.

Far fewer pictures are needed than by contrast alone: a picture is compared with every word there is, not with the
few texts of its batch, and a region says where a thing stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, SiglipModel

from assistant.fusion import FEATURE_LAYER
from training.data.pictures import Picture, Region
from training.gather import sum_over_ranks
from training.naming import named_patches, naming_loss, regions_of, share_named, word_ids
from training.objective import Start, Watched
from training.objectives import siglip
from training.picture_text import CaptionedView

MOST_WORDS = 128  # different tokens of what is said of a picture; the rest are left out


class Settings(siglip.Settings):
    """What a recipe may say of it, beside what it may say of SigLIP."""

    contrast: float = Field(1.0, ge=0, description="weight of SigLIP's own loss")
    pictures: float = Field(1.0, ge=0, description="weight of the words of whole pictures")
    regions: float = Field(1.0, ge=0, description="weight of the words of regions")


@dataclass(frozen=True)
class NamedView:
    """A captioned view, everything that was said of its picture, and the regions that have names of their own."""

    captioned: CaptionedView
    said: tuple[str, ...]
    regions: tuple[Region, ...]


class WordsObjective(siglip.SiglipObjective):
    """SuperClass (Huang et al. 2024): a softmax over the tokenizer's words, rare ones weighing more, beside SigLIP.

    The features are those of the layer that a language model will look at: each patch in a region names the region's
    words, all weighing alike, and their mean names those of the picture.
    """

    def __init__(
        self,
        model: SiglipModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        side: int,
        settings: Settings,
    ) -> None:
        """`side`: pixels of a view. Raises ValueError where the parts misfit."""
        super().__init__(model, tokenizer, image_processor, side, settings.smallest_crop)
        self.settings = settings
        self.names = nn.Linear(model.config.vision_config.hidden_size, len(tokenizer))
        self.counts: Tensor
        self.pending: Tensor
        self.register_buffer("counts", torch.zeros(len(tokenizer) + 1))  # the last place counts pictures
        self.register_buffer("pending", torch.zeros(len(tokenizer) + 1), persistent=False)

    def sample(self, picture: Picture, generator: np.random.Generator) -> Any:
        """The view that SigLIP would take, with all words of the picture. One with regions is never cropped."""
        if picture.regions and not picture.whole:
            raise ValueError(f"{picture.name} has regions and may be cropped; regions are told of whole pictures")
        captioned = super().sample(picture, generator)
        return NamedView(captioned, (*picture.texts, *picture.also_true), picture.regions)

    def collate(self, samples: Sequence[Any]) -> Mapping[str, Tensor]:
        """SigLIP's batch, that of `regions_of`, and `said` (B, W), ids of words, and -1 where there are no more."""
        regions = regions_of(
            [sample.regions for sample in samples], self.tower.grid(self.side, self.side), self.tokenizer
        )
        said = torch.stack([word_ids(self.tokenizer, sample.said, MOST_WORDS) for sample in samples])
        captioned = super().collate([sample.captioned for sample in samples])
        return {**captioned, "said": said, **regions}

    def represent(self, **batch: Any) -> dict[str, Tensor]:
        """SigLIP's representations, the patches' features (b, N, D) and their mean (b, D)."""
        pixels = self.tower.normalise(batch["views"])
        seen = self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        texts = self.model.get_text_features(input_ids=batch["text_ids"]).pooler_output
        patches = seen.hidden_states[FEATURE_LAYER].float()
        patches = functional.layer_norm(patches, patches.shape[-1:])
        return {
            "pictures": functional.normalize(seen.pooler_output.float(), dim=-1),
            "texts": functional.normalize(texts.float(), dim=-1),
            "whole": patches.mean(1),
            "patches": patches,
            **{name: batch[name] for name in ("identity", "true", "said", "region_of", "region_said")},
        }

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """SigLIP's loss, the words' and the regions', each times its weight, and facts for the log."""
        said = representations["said"]
        told = (said >= 0).any(-1)
        named, region_said = named_patches(representations["region_of"], representations["region_said"])
        if self.training:
            self._count(said)
        weights = self._weights()
        values = super().compare(representations)
        values["sigmoid_loss"] = self.settings.contrast * values["sigmoid_loss"]
        whole, patches = self.names(representations["whole"][told]), self.names(representations["patches"][named])
        values["words_loss"] = self.settings.pictures * naming_loss(whole, said[told], weights)
        values["regions_loss"] = self.settings.regions * naming_loss(patches, region_said, torch.ones_like(weights))
        return {**values, "regions_named": share_named(patches.detach(), region_said)}

    def watched(self, samples: int) -> Watched:
        """Both halves; what one who knows nothing pays hangs on how many words are said of a picture."""
        return replace(super().watched(samples), untaught={})

    def _count(self, said: Tensor) -> None:
        """Note in how many pictures each word was said."""
        ids = said[said >= 0]
        self.pending.index_add_(0, ids, torch.ones_like(ids, dtype=self.pending.dtype))
        self.pending[-1] += len(said)

    def _weights(self) -> Tensor:
        """(V,) how much each word tells: the log of pictures by pictures with it (SuperClass's online IDF)."""
        return torch.log((self.counts[-1] + 1) / (self.counts[:-1] + 1)).clamp_min(0.0) + 1e-3

    def after_step(self, step: int, steps: int) -> None:
        """Let the words of this step, on all ranks, weigh from the next one on."""
        self.counts += sum_over_ranks(self.pending)
        self.pending.zero_()


def build(settings: Settings, start: Start) -> WordsObjective:
    """Naming on `start.model`. Raises ValueError when that is no SiglipModel, or a new one without a temperature."""
    return WordsObjective(*siglip.prepared(settings, start), start.side, settings)
