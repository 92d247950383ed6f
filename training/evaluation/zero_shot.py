"""What the shared space of pictures and texts knows untaught: naming pictures, and finding one by the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

QUERIES_AT_ONCE = 1024


def zero_shot_labels(pictures: Tensor, labels: Tensor) -> Tensor:
    """(B,) which of the (C, D) label embeddings is nearest to each of the (B, D) pictures, all of unit length."""
    return (pictures @ labels.T).argmax(-1)


def ranks(queries: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """(Q,) how many wrong candidates stand before the best right one: 0 where a right one is first.

    A wrong candidate that is exactly as near stands before it, so that a tower which maps everything to one point finds
    nothing, instead of everything.

    Args:
        queries, candidates: (Q, D) and (M, D) of unit length.
        right: (Q, M) bool, at least one in every row.
    """
    found = []
    for some, true in zip(queries.split(QUERIES_AT_ONCE), right.split(QUERIES_AT_ONCE), strict=True):
        similarity = some @ candidates.T
        best = similarity.masked_fill(~true, float("-inf")).amax(-1, keepdim=True)
        found.append(((similarity >= best) & ~true).sum(-1))
    return torch.cat(found)


def recall(found: Tensor, first: int) -> float:
    """The share of queries with a right candidate among the `first` nearest, from their `ranks`."""
    return float((found < first).double().mean())


def chance_recall(right: Tensor, first: int) -> float:
    """What `recall` at `first` is in the mean when candidates come in random order; `right` is (Q, M) as in `ranks`.

    With m right ones among M: 1 - C(M - m, first) / C(M, first).
    """
    candidates = right.shape[1]
    number = right.sum(-1).double()
    missed = torch.ones_like(number)
    for drawn in range(min(first, candidates)):
        missed *= ((candidates - number - drawn) / (candidates - drawn)).clamp_min(0)
    return float((1 - missed).mean())


def who_says_what(texts_of: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """The distinct texts of some pictures, and (pictures, texts) bool: which of them are said of which picture.

    A text that two pictures share is one candidate, right for both.
    """
    texts = list(dict.fromkeys(text for said in texts_of for text in said))
    place = {text: number for number, text in enumerate(texts)}
    right = torch.zeros(len(texts_of), len(texts), dtype=torch.bool)
    for picture, said in enumerate(texts_of):
        right[picture, [place[text] for text in said]] = True
    return texts, right
