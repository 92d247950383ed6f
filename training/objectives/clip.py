"""Contrastive pretraining with a softmax: each picture finds its text among all, and each text its picture."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor, PreTrainedTokenizerBase

from assistant.tower_shapes import LEGACY_END_ID
from training.comparison import refuse_one_sample
from training.contrastive_losses import clip_loss
from training.objective import Start, Watched
from training.picture_text import (
    PictureTextObjective,
    PictureTextSettings,
    given_picture_text,
)

LARGEST_SCALE = 100.0  # section 2.5 of the paper: above it training was not stable


class Settings(PictureTextSettings):
    """What a recipe may say of CLIP. A new model starts at temperature 1/0.07, as in the paper, by itself."""


class ClipObjective(PictureTextObjective):
    """CLIP (Radford et al. 2021) of both halves of a `CLIPModel`."""

    processor_class = CLIPProcessor
    masks_padding = True

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of both directions over all ranks, and facts for the log."""
        refuse_one_sample(len(representations["pictures"]), self.training)
        loss = clip_loss(
            representations["pictures"],
            representations["texts"],
            self.model.logit_scale.exp(),
            representations["identity"],
        )
        return {"clip_loss": loss, **self.facts(representations)}

    def watched(self, samples: int) -> Watched:
        """Both halves; guessing evenly among the texts of a step costs the log of their number."""
        halves = super().watched(samples)
        return replace(halves, untaught={"clip_loss": math.log(samples)}, largest={"scale": LARGEST_SCALE})

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Keep the scale of logits at 100 or below."""
        self.model.logit_scale.clamp_(max=math.log(LARGEST_SCALE))


def build(settings: Settings, start: Start) -> ClipObjective:
    """CLIP of `start.model`. Raises ValueError when that is no CLIPModel, or its tokenizer does not end a text."""
    model, tokenizer, image_processor = given_picture_text(start, "clip", CLIPModel)
    refuse_endless_texts(model, tokenizer)
    if settings.start_temperature is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(settings.start_temperature))
    return ClipObjective(model, tokenizer, image_processor, start.side, settings.smallest_crop)


def refuse_endless_texts(model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError when the last token of a text is not the one that `model` pools at.

    Where the configuration says 2, transformers pools at the largest id of a text; else at the configured id.
    """
    last = tokenizer("a picture")["input_ids"][-1]
    end = model.config.text_config.eos_token_id
    if last != (len(tokenizer) - 1 if end == LEGACY_END_ID else end):
        raise ValueError(
            f"a CLIP pools a text at its end token, here number {end}, and this tokenizer ends a text with number "
            f"{last}: give a published CLIP its own tokenizer, and a new one what clip_tokenizer makes"
        )
