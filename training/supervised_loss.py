"""Head and cross-entropy on supervised tokens only, a chunk at a time, so that no full logits are ever kept."""

from typing import Any

import torch
from torch import Tensor

# Tokens whose logits are alive at once: a GPU wants more work at a time, a CPU is nearly as quick with few.
CHUNK, CHUNK_OF_CPU = 1024, 128


def supervised_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    chunk: int | None = None,
    total_weight: Tensor | None = None,
) -> Tensor:
    """Weighted mean of -log softmax(hidden @ head.T)[target].

    Args:
        hidden: (S, D) last hidden states that predict the S supervised tokens.
        head: (V, D) output embedding.
        targets: (S,) token ids.
        token_weights: (S,) weight of each token, all 1 for the usual mean.
        chunk: tokens whose (chunk, V) logits are alive at once; by default what suits the device.
        total_weight: () what the weighted sum is divided by, where it is not the sum of these weights.

    The gradient is the closed form (softmax - one hot), computed along with the loss, so memory is O(chunk * V + V * D)
    instead of O(S * V); a head that does not train costs no gradient. Equal to `torch.nn.functional.cross_entropy` on
    the same logits. Raises ValueError when S is 0.
    """
    if targets.numel() == 0:
        raise ValueError("no token of this batch is supervised; check the data with the recipe's preview")
    if chunk is None:
        chunk = CHUNK_OF_CPU if hidden.device.type == "cpu" else CHUNK
    divisor = token_weights.sum() if total_weight is None else total_weight
    return _ChunkedCrossEntropy.apply(hidden, head, targets, token_weights / divisor, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        narrow_hidden, narrow_head = hidden.to(dtype), head.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(narrow_hidden)
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = (narrow_hidden[part] @ narrow_head.T).float()
            target, weight = targets[part, None], weights[part, None].float()
            logits -= logits.amax(-1, keepdim=True)
            of_target = logits.gather(-1, target)
            total = logits.exp_().sum(-1, keepdim=True)
            loss += (weight * (total.log() - of_target)).sum()
            gradient = logits.mul_(weight / total).scatter_add_(-1, target, -weight).to(dtype)
            hidden_gradient[part] = gradient @ narrow_head
            if head_gradient is not None:
                head_gradient += gradient.T @ narrow_hidden[part]
        own = None if head_gradient is None else head_gradient.to(head.dtype)
        ctx.save_for_backward(hidden_gradient.to(hidden.dtype), own)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        to_head = None if head_gradient is None else outputs[0] * head_gradient
        return outputs[0] * hidden_gradient, to_head, None, None, None
