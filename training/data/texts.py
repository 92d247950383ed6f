"""Read texts, and pack them into blocks of equal length for language pretraining."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from assistant.chat import assistant_message, encode_conversation, user_message
from training.data.mixing import mixture_plan
from training.data.pictures import shard_files

END_MARK = "<|endoftext|>"  # some sources end their answers with it; the template has its own end


@dataclass(frozen=True)
class TextRow:
    """One document, or one answer with its prompt."""

    source: str
    prompt: str | None
    text: str


def read_texts(folder: Path, name: str, without: Collection[str] = ()) -> list[TextRow]:
    """The rows of the text shards called `name`, less those whose text is in `without` (held-out captions)."""
    records = [r for file in shard_files(folder, name) for r in parquet.read_table(file).to_pylist()]
    rows = (TextRow(r["source"], r["prompt"], r["text"].replace(END_MARK, "").strip()) for r in records)
    return [row for row in rows if row.text and row.text not in without]


def encode_text(tokenizer: PreTrainedTokenizerBase, row: TextRow, longest_characters: int) -> list[int]:
    """Ids of a plain document between begin and end, or of prompt and answer in the chat template."""
    text = row.text[:longest_characters]
    if row.prompt:
        messages = [user_message(row.prompt[:longest_characters]), assistant_message(text)]
        return encode_conversation(tokenizer, messages, tokens_per_picture=0).ids
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


class TextBlocks(Dataset[Tensor]):
    """`total` blocks of `length` token ids (int64), mixed from weighted sources of texts, one text after the other."""

    def __init__(
        self,
        sources: Sequence[Sequence[TextRow]],
        weights: Sequence[float],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        total: int,
        seed: int,
        longest_characters: int = 2000,
    ) -> None:
        """`weights` are shares of documents. Encoding stops once `total` blocks are full."""
        # A document has at least two tokens, which bounds how many can be needed; they are encoded only as needed.
        source, index = mixture_plan([len(s) for s in sources], weights, total * length // 2, seed)
        ids: list[int] = []
        for which, number in zip(source, index, strict=True):
            if len(ids) >= total * length:
                break
            ids += encode_text(tokenizer, sources[which][number], longest_characters)
        self.blocks = torch.from_numpy(np.asarray(ids[: total * length], dtype=np.int64)).view(total, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: int) -> Tensor:
        return self.blocks[place]
