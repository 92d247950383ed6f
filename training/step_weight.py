"""Let every token of a step count alike, in whichever micro-batch and on whichever rank it stands."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState

WEIGHTS, STEP_WEIGHT = "weights", "step_weight"  # keys of a batch: of each token; of all tokens of the step


def share_step_weight(batches: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Write into each of a step's micro-batches the sum of all ranks' token weights, over their number.

    A loss divided by it, averaged over the micro-batches and ranks as trainer and DistributedDataParallel do, is the
    weighted mean over all tokens of the step. Without it a token in a short micro-batch counts for more than one in a
    long one. Batches without weights stay as they are. All ranks must call.
    """
    if not batches or WEIGHTS not in batches[0]:
        return
    state = PartialState()
    total = torch.stack([batch[WEIGHTS].sum() for batch in batches]).sum().to(device)
    if state.num_processes > 1:
        torch.distributed.all_reduce(total)
    for batch in batches:
        batch[STEP_WEIGHT] = total / (len(batches) * state.num_processes)


class SharesStepWeight:
    """What a trainer adds for that; stands before `transformers.Trainer` among the bases."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of the next step, and what transformers counts in them."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        share_step_weight(batches, device)
        return batches, count
