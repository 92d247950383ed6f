"""Bytes that a step keeps of its layers for the way back, by formula, with and without gradient checkpointing."""

from collections.abc import Iterable

from torch import nn

from training.heads import PrototypeHead
from training.planning.passes import Convolutions, Layers, Passes

FULL = 4  # bytes of fp32


def kept_by(passes: Iterable[Passes], samples: int, half: bool, checkpointed: bool = False) -> float:
    """Bytes for `samples` samples that go through all of `passes`; those that do not train keep nothing.

    `half` is bf16 autocast. With `checkpointed` layers only their inputs are kept (Chen et al. 2016), and what
    `recomputed` says comes on top going back; of a ResNet nothing is checkpointed.
    """
    return samples * sum(one.rows * _of_a_row(one, half, checkpointed) for one in passes if one.trains)


def _of_a_row(one: Passes, half: bool, checkpointed: bool) -> float:
    narrow = 2 if half else FULL
    picture = one.pixels * (FULL + (narrow if half else 0))
    if isinstance(one, Convolutions):
        # Each convolution's output waits for its batch norm, and what follows that for the next convolution.
        return picture + 2 * narrow * one.outputs
    ends = one.tokens * one.width * (FULL + narrow)  # the last norm's input and output
    if one.pooled:
        ends += 2 * one.tokens * one.width * narrow
    if checkpointed:
        return picture + ends + one.count * one.tokens * one.width * FULL
    return picture + ends + one.count * layer_kept(one, half)


def recomputed(passes: Iterable[Passes], samples: int, half: bool) -> float:
    """Bytes of the largest layer, which a checkpointed step computes again and keeps for a moment."""
    sizes = [one.rows * layer_kept(one, half) for one in passes if one.trains and isinstance(one, Layers)]
    return samples * max(sizes, default=0.0)


def layer_kept(one: Layers, half: bool) -> float:
    """Bytes that one layer keeps of one row.

    As Korthikanti et al. (2022, section 4.1) count, for layers without dropout and with fused attention: both norms'
    inputs in fp32; in the narrow type what enters the maps (two norms' outputs, the attention's output, the MLP's
    inner values) and query, key and value. Eager attention keeps its (heads, T, T) softmax as well.
    """
    narrow = 2 if half else FULL
    width, inner = one.width, one.feed_forward
    norms = 2 * width * FULL * (2 if one.gated else 1)  # RMSNorm keeps its normalised values too
    in_attention = 2 * width + width + 2 * one.keys + width  # norms' outputs, query, key and value, output
    in_mlp = (4 if one.gated else 2) * inner
    scaled = 2 * width if one.scaled else 0
    per_token = norms + narrow * (in_attention + in_mlp + scaled)
    # Fused attention keeps one normaliser a token and head, eager attention all of its softmax.
    softmax = one.heads * one.tokens * (one.tokens * (FULL + (narrow if half else 0)) if one.eager else FULL)
    return one.tokens * per_token + softmax


def head_kept(head: nn.Module, rows: int, half: bool) -> float:
    """Bytes that a head keeps of `rows` rows: what enters each map, and what each map gives."""
    narrow = 2 if half else FULL
    maps = [module for module in head.modules() if isinstance(module, nn.Linear)]
    kept = rows * sum(narrow * (one.in_features + one.out_features) for one in maps)
    if isinstance(head, PrototypeHead):
        kept += head.prototypes.numel() * (FULL + (narrow if half else 0))  # at unit length
    return kept
