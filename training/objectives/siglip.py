"""Contrastive pretraining with the sigmoid loss: a picture and its own text agree, all other pairs do not."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, SiglipImageProcessor, SiglipModel, SiglipProcessor

from training.data.views import normalise
from training.objective import Objective


@dataclass(frozen=True)
class CaptionedView:
    """One view of a picture, uint8 (3, side, side), and one text that is true of it."""

    view: Tensor
    text: str


def sigmoid_loss(pictures: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, same_text: Tensor) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, equation 1), summed over pairs and divided by B.

    Args:
        pictures, texts: (B, D) embeddings of unit length.
        scale, bias: the learned temperature (already exponentiated) and bias.
        same_text: (B, B) bool, true where text j is also true of picture i. The paper has the diagonal only; class
            labels repeat inside a batch, and calling a true pair false teaches the wrong thing.
    """
    logits = pictures.float() @ texts.float().T * scale + bias
    signs = same_text.to(logits.dtype) * 2 - 1
    return -functional.logsigmoid(signs * logits).sum() / len(logits)


class SiglipObjective(Objective):
    """Trains both towers of a `SiglipModel` on captioned views."""

    def __init__(self, model: SiglipModel, tokenizer: PreTrainedTokenizerBase, side: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.side = side
        self.text_length = model.config.text_config.max_position_embeddings

    @staticmethod
    def start_temperature(model: SiglipModel) -> None:
        """Set temperature 10 and bias -10, where the paper starts: nearly every pair is false at first."""
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10.0))
            model.logit_bias.fill_(-10.0)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Loss, and how often a picture's own text is the best of the batch."""
        vision = self.model.vision_model(normalise(batch["views"]), interpolate_pos_encoding=True)
        pictures = functional.normalize(vision.pooler_output.float(), dim=-1)
        text = self.model.text_model(batch["text_ids"])
        texts = functional.normalize(text.pooler_output.float(), dim=-1)
        with torch.autocast(pictures.device.type, enabled=False):
            loss = sigmoid_loss(
                pictures, texts, self.model.logit_scale.exp(), self.model.logit_bias, batch["same_text"]
            )
            best = (pictures @ texts.T).argmax(-1)
        hit = batch["same_text"][torch.arange(len(best), device=best.device), best].float().mean()
        return {
            "sigmoid_loss": loss,
            "picture_finds_text": hit.detach(),
            "scale": self.model.logit_scale.exp().detach(),
        }

    def collate(self, samples: Sequence[CaptionedView]) -> Mapping[str, Tensor]:
        """Views (B, 3, side, side) uint8, text_ids (B, T), same_text (B, B)."""
        texts = [sample.text for sample in samples]
        return {
            "views": torch.stack([sample.view for sample in samples]),
            "text_ids": text_ids(self.tokenizer, texts, self.text_length),
            "same_text": torch.tensor([[a == b for b in texts] for a in texts]),
        }

    def trained_parameters(self) -> set[str]:
        """Everything: both towers, temperature and bias."""
        return {name for name, _ in self.named_parameters()}

    def export(self, folder: Path) -> None:
        """A plain `SiglipModel` with its processor, loadable by transformers alone."""
        self.model.save_pretrained(folder)
        self.processor().save_pretrained(folder)

    def processor(self) -> SiglipProcessor:
        """Resizes pictures to this objective's side, and pads texts as they were padded in training."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.model_max_length = self.text_length
        tokenizer.padding_side = "right"
        size = {"height": self.side, "width": self.side}
        return SiglipProcessor(SiglipImageProcessor(size=size, resample=2), tokenizer)


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Tensor:
    """(B, length) ids, cut or padded on the right with the pad token, as SigLIP's text tower reads them."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding="max_length",
        padding_side="right",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    return encoded["input_ids"]
