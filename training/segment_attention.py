"""Attention of several conversations that lie in one row, each within itself: nothing is computed between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATION = "kangaroo_segments"


@dataclass(frozen=True)
class Segment:
    """T neighbouring places of a row that attend to each other: causally, or as `mask` (T, T) bool says."""

    start: int
    stop: int
    mask: Tensor | None = None


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Sequence[Segment] = (),
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' own fused attention, segment by segment, of one row (1, heads, T, D) -> (1, T, heads, D).

    Places behind the last segment come out as zeros. One row with a block-diagonal mask would cost its whole square: on
    a CPU that was slower than padding. Raises ValueError without segments, as when such a model is asked to generate:
    load what was exported for that.
    """
    if not segments:
        raise ValueError("this model was set up to train on packed lessons and got no segments; load it anew to ask it")
    parts = []
    for segment in segments:
        place = slice(segment.start, segment.stop)
        mask = None if segment.mask is None else segment.mask[None, None].to(query.device)
        part, _ = sdpa_attention_forward(
            module, query[:, :, place], key[:, :, place], value[:, :, place], mask, is_causal=mask is None, **others
        )
        parts.append(part)
    padding = query.shape[2] - segments[-1].stop
    return torch.cat([*parts, query.new_zeros(1, padding, query.shape[1], value.shape[-1])], dim=1), None


AttentionInterface.register(IMPLEMENTATION, segment_attention)


def attend_by_segments(language_model: PreTrainedModel) -> None:
    """Let `language_model` attend within the segments that its forward is given, and only there."""
    language_model.set_attn_implementation(IMPLEMENTATION)
