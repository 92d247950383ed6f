"""Contrastive pretraining with the sigmoid loss: a picture and its own text agree, all other pairs do not."""

import math
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, SiglipModel, SiglipProcessor

from training.comparison import refuse_one_sample
from training.objective import Start, Watched
from training.picture_text import (
    PictureTextObjective,
    PictureTextSettings,
    given_picture_text,
)
from training.sigmoid_loss import sigmoid_loss


class Settings(PictureTextSettings):
    """What a recipe may say of SigLIP. A new model starts at temperature 10 and bias -10 in the paper."""

    start_bias: float | None = Field(None, description="added to each logit at first; the model's own where unset")


class SiglipObjective(PictureTextObjective):
    """SigLIP (Zhai et al. 2023) of both halves of a `SiglipModel`."""

    processor_class = SiglipProcessor
    masks_padding = False

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sigmoid loss over all ranks, and facts for the log."""
        refuse_one_sample(len(representations["pictures"]), self.training)
        loss = sigmoid_loss(
            representations["pictures"],
            representations["texts"],
            self.model.logit_scale.exp(),
            self.model.logit_bias,
            representations["identity"],
            representations["true"],
        )
        return {"sigmoid_loss": loss, **self.facts(representations), "bias": self.model.logit_bias.detach()}

    def watched(self, samples: int) -> Watched:
        """Both halves; one who calls each pair true with chance 1 / B pays B times the entropy of that chance."""
        untaught = math.log(samples) - (samples - 1) * math.log1p(-1 / samples) if samples > 1 else 0.0
        return replace(super().watched(samples), untaught={"sigmoid_loss": untaught})


def prepared(settings: Settings, start: Start) -> tuple[SiglipModel, PreTrainedTokenizerBase, BaseImageProcessor]:
    """The parts of `start`, with the settings' temperature and bias.

    Raises ValueError when it has no SiglipModel, or a new one without a temperature.
    """
    model, tokenizer, image_processor = given_picture_text(start, "siglip", SiglipModel)
    with torch.no_grad():
        if settings.start_temperature is not None:
            model.logit_scale.fill_(math.log(settings.start_temperature))
        if settings.start_bias is not None:
            model.logit_bias.fill_(settings.start_bias)
    if model.logit_scale.item() == model.logit_bias.item() == 0:
        raise ValueError(
            "this SiglipModel is new: its temperature is 1 and its bias 0, where every pair counts as half true; "
            "start where the paper does, with start_temperature: 10 and start_bias: -10"
        )
    return model, tokenizer, image_processor


def build(settings: Settings, start: Start) -> SiglipObjective:
    """SigLIP of `start.model`. Raises ValueError when that is no SiglipModel, or a new one without a temperature."""
    return SiglipObjective(*prepared(settings, start), start.side, settings.smallest_crop)
