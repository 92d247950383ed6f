"""Patches that name words: which patches a region has, the ids of its words, and what naming them costs."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from training.data.pictures import Region
from training.gather import ranks, sum_over_ranks

MOST_REGIONS = 8
MOST_REGION_WORDS = 8


def regions_of(
    regions: Sequence[Sequence[Region]], grid: tuple[int, int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """The regions of B pictures whose patches stand in `grid` (rows, columns).

    `region_of` (B, N), which region a patch is in; `region_said` (B, R, V), ids of the regions' words. Where there is
    none stands -1.
    """
    region_of = torch.full((len(regions), grid[0] * grid[1]), -1)
    region_said = torch.full((len(regions), MOST_REGIONS, MOST_REGION_WORDS), -1)
    for row, of_picture in enumerate(regions):
        for number, region in enumerate(of_picture[:MOST_REGIONS]):
            region_of[row, patches_in(region, grid)] = number
            region_said[row, number] = word_ids(tokenizer, region.words, MOST_REGION_WORDS)
    return {"region_of": region_of, "region_said": region_said}


def word_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int) -> Tensor:
    """(most,) different ids of the words of `texts`, in their order, then -1."""
    if not texts:
        return torch.full((most,), -1)
    # A space before, because that is how a word stands within texts; without it most words fall into pieces.
    spaced = [f" {text}" for text in texts]
    read = tokenizer(spaced, add_special_tokens=False, truncation=True, max_length=most)["input_ids"]
    different = list(dict.fromkeys(chain.from_iterable(read)))[:most]
    return torch.tensor(different + [-1] * (most - len(different)))


def named_patches(region_of: Tensor, region_said: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches are in a region, bool (B, N), and the ids of its words for each of these n, (n, V)."""
    named = region_of >= 0
    rows = torch.arange(len(region_of), device=region_of.device)[:, None].expand_as(region_of)
    return named, region_said[rows[named], region_of[named]]


def patches_in(region: Region, grid: tuple[int, int]) -> Tensor:
    """(N,) bool: the patches whose centres lie in `region`, or the one nearest to its own centre where none does."""
    rows, columns = grid
    down, across = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    left, top, right, bottom = region.box
    inside = ((down >= top) & (down <= bottom))[:, None] & ((across >= left) & (across <= right))[None]
    if not inside.any():
        away = (down - (top + bottom) / 2)[:, None] ** 2 + (across - (left + right) / 2)[None] ** 2
        inside = away == away.min()
    return inside.flatten()


def share_named(logits: Tensor, said: Tensor) -> Tensor:
    """Of n rows, the share whose most likely words (n, V) are, in any order, all that were said (n, W) and no other."""
    number = (said >= 0).sum(-1)
    likeliest = logits.topk(int(number.max()) if len(number) else 1).indices
    right = (likeliest[:, :, None] == said[:, None]).any(-1)
    asked = torch.arange(likeliest.shape[1], device=said.device) < number[:, None]
    return (right | ~asked).all(-1).float().sum() / max(1, len(said))


def naming_loss(logits: Tensor, said: Tensor, weights: Tensor) -> Tensor:
    """Mean over the rows of all ranks of the cross-entropy between a softmax over words and the words that were said.

    logits (n, V); said (n, W) ids, -1 where none is; weights (V,) of the words, shared out within a row. A rank without
    rows has loss 0. SuperClass (Huang et al. 2024), equations 1 to 4.
    """
    chosen = weights[said.clamp_min(0)] * (said >= 0)
    chosen = chosen / chosen.sum(-1, keepdim=True).clamp_min(1e-12)
    scores = logits.log_softmax(-1).gather(-1, said.clamp_min(0))
    rows = sum_over_ranks(torch.tensor(float(len(said)), device=logits.device)) / ranks()
    return -(chosen * scores).sum() / rows.clamp_min(1e-12)
