"""Pretraining a language model: predict every next token of plain text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from assistant.weight_files import write_model
from training.objective import Objective
from training.supervised_loss import supervised_cross_entropy


class LanguageObjective(Objective):
    """Trains all of a causal language model on blocks of packed text."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Mean next-token loss over all T - 1 predictions of `blocks` (B, T)."""
        blocks = batch["blocks"]
        hidden = self.model.get_decoder()(input_ids=blocks).last_hidden_state[:, :-1].flatten(0, 1)
        targets = blocks[:, 1:].flatten()
        weights = torch.ones_like(targets, dtype=torch.float32)
        head = self.model.get_output_embeddings().weight
        return {"next_token_loss": supervised_cross_entropy(hidden, head, targets, weights)}

    def collate(self, samples: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Stack blocks of T token ids."""
        return {"blocks": torch.stack(list(samples))}

    def tokens_of(self, batch: Mapping[str, Any]) -> int:
        """All of them."""
        return int(batch["blocks"].numel())

    def trained_parameters(self) -> set[str]:
        """Everything."""
        return {name for name, _ in self.named_parameters()}

    def export(self, folder: Path) -> None:
        """A plain causal language model with its tokenizer."""
        write_model(self.model, folder)
        self.tokenizer.save_pretrained(folder)
