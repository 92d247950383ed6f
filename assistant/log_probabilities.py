"""The log-probabilities that a model gives to tokens, and how far two programs may lie apart in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from assistant.answering import Assistant, Request

Arithmetic = Literal["float32", "bfloat16", "float16"]

# In float32 only the order of additions differs. In bfloat16 each of some dozens of roundings keeps 8 bits (2^-9 =
# 0.2 % relative): logits around 10 move by a few hundredths each time, and 0.15 is what is left of that at the end.
# float16 keeps 11 bits.
TOLERANCE: dict[Arithmetic, float] = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.02}
# Tokens of less than 0.7 % are nobody's answer, and their logits lie where the roundings are coarsest.
LIKELY = -5.0


@dataclass(frozen=True)
class Reading:
    """What a model read, and what it expects behind each token of it."""

    ids: list[int]  # T token ids, a picture's places among them
    pixels: Tensor | None  # (B, 3, H, W) or as the layout has it, normalised; None without a picture
    log_probabilities: Tensor  # float32 (T, V), on the CPU


def read(assistant: Assistant, request: Request, answer: Sequence[int] = ()) -> Reading:
    """`request` as the model reads it, with the token ids of an `answer` behind it, in one pass."""
    inputs = dict(assistant.inputs([request]))
    ids = inputs["input_ids"]
    answered = torch.tensor([list(answer)], dtype=ids.dtype, device=ids.device)
    inputs["input_ids"] = torch.cat([ids, answered], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = assistant.model(**inputs).logits[0]
    pixels = inputs.get("pixel_values")
    return Reading(
        inputs["input_ids"][0].tolist(),
        None if pixels is None else pixels.cpu(),
        logits.float().log_softmax(-1).cpu(),
    )


def apart(these: Tensor, those: Tensor) -> float:
    """The largest difference between two tables of log-probabilities, where either holds a token for likely.

    NaN where one of them is no number.
    """
    unlikely = torch.maximum(these, those) <= LIKELY
    return float((these - those).abs().masked_fill(unlikely, 0.0).max())
