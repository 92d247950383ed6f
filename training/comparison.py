"""What contrastive objectives ask beside their loss: is there anything to compare, and how often are they right?"""

import torch
from torch import Tensor

from training.gather import ranks

MOST_ASKED = 256  # queries a step; asking for all of a large batch would cost as much as a third of its loss


def refuse_one_sample(samples: int, training: bool) -> None:
    """Raises ValueError when a step of training has one sample: `samples` is how many this rank has."""
    if training and samples * ranks() < 2:
        raise ValueError(
            "a step of one sample has nothing to compare it with: "
            "batch_size x accumulation x processes has to be 2 or more"
        )


@torch.no_grad()
def share_found(queries: Tensor, candidates: Tensor, wanted: Tensor, identity: Tensor, first_are_same: bool) -> Tensor:
    """The share of queries whose best candidate has the identity they want; at most 256 queries are asked.

    Args:
        queries: (Q, D) of unit length, and `wanted` (Q,) what each looks for; (Q, M) where any of M will do.
        candidates: (B, D) of unit length, and `identity` (B,) what each is; (B, M) where it is all of M.
        first_are_same: the queries are the first candidates, and may not find themselves.
    """
    cosines = queries[:MOST_ASKED].float() @ candidates.float().T
    if first_are_same:
        cosines.diagonal().fill_(-torch.inf)
    asked = wanted[:MOST_ASKED]
    found = identity[cosines.argmax(-1)]
    return (found.view(len(found), -1, 1) == asked.view(len(asked), 1, -1)).flatten(1).any(1).float().mean()
