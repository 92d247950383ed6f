"""Head and cross-entropy on supervised tokens only, a chunk at a time, so that no full logits are ever kept."""

from typing import Any

import torch
from torch import Tensor


def supervised_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, token_weights: Tensor, chunk: int = 1024
) -> Tensor:
    """Weighted mean of -log softmax(hidden @ head.T)[target].

    Args:
        hidden: (S, D) last hidden states that predict the S supervised tokens.
        head: (V, D) output embedding.
        targets: (S,) token ids.
        token_weights: (S,) weight of each token, all 1 for the usual mean.
        chunk: tokens whose (chunk, V) logits are alive at once.

    The gradient is the closed form (softmax - one hot), computed along with the loss, so memory is O(chunk * V + V * D)
    instead of O(S * V). Equal to `torch.nn.functional.cross_entropy` on the same logits. Raises ValueError when S is 0.
    """
    if targets.numel() == 0:
        raise ValueError("no token of this batch is supervised; check the data with the recipe's preview")
    return _ChunkedCrossEntropy.apply(hidden, head, targets, token_weights / token_weights.sum(), chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        narrow_hidden, narrow_head = hidden.to(dtype), head.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(narrow_hidden)
        head_gradient = torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = (narrow_hidden[part] @ narrow_head.T).float()
            target, weight = targets[part, None], weights[part, None].float()
            log_normaliser = logits.logsumexp(-1, keepdim=True)
            loss += (weight * (log_normaliser - logits.gather(-1, target))).sum()
            gradient = logits.sub_(log_normaliser).exp_().mul_(weight).scatter_add_(-1, target, -weight).to(dtype)
            hidden_gradient[part] = gradient @ narrow_head
            head_gradient += gradient.T @ narrow_hidden[part]
        ctx.save_for_backward(hidden_gradient.to(hidden.dtype), head_gradient.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        return outputs[0] * hidden_gradient, outputs[0] * head_gradient, None, None, None
