"""SigLIP's loss, in blocks of rows with its closed-form gradient; texts go round the ranks and are never gathered."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.contrastive_losses import refuse_second_derivative
from training.gather import exchange_with_neighbour, ranks

CPU_BLOCK, GPU_BLOCK = 2**20, 2**25  # pairs worked on at once


def sigmoid_loss(
    pictures: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    identity: Tensor | None = None,
    true: Tensor | None = None,
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, equation 1), summed over pairs and divided by B.

    Args:
        pictures, texts: (B, D) embeddings of unit length; row i of both belongs together.
        scale, bias: () or (1,) the learned temperature (already exponentiated) and bias.
        identity: (B,) int64, equal where two texts say the same; none where every text stands for itself. The paper's
            true pairs are the diagonal; class labels repeat inside a batch, and calling a true pair false teaches the
            wrong thing.
        true: (B, M) int64, the identities of all texts that are true of each picture, its own among them; that of its
            own text alone where None.

    Over R ranks each rank returns the loss of its own pictures against all texts. The texts go round a ring of ranks
    (section 3.3 of the paper), and their gradients go along with them and come home after R steps; nothing is sent
    going back. With parameter gradients averaged over the ranks (as DDP does) that is one process with the joined
    batch. So the factor that the loss is multiplied with must be the same on each rank.

    The gradient is computed along with the loss, in fp32 whatever comes in, and no (B, B) matrix is ever kept. There is
    no second derivative.
    """
    tensors = (pictures.float(), texts.float(), scale.float(), bias.float())
    with_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.autocast(pictures.device.type, enabled=False):
        return _SigmoidLoss.apply(*tensors, identity, None if true is None else _without_repeats(true), with_gradient)


def _without_repeats(true: Tensor) -> Tensor | None:
    """`true` (B, M) without the columns that only repeat the first one; None where all others do."""
    tells = (true != true[:, :1]).any(0)
    return torch.cat([true[:, :1], true[:, tells]], dim=1) if bool(tells.any()) else None


class _Sums:
    """What one rank adds up over the texts that visit it: its loss and, if wanted, the gradients of it."""

    def __init__(self, pictures: Tensor, scale: Tensor, bias: Tensor, with_gradient: bool) -> None:
        self.pictures, self.scale, self.bias = pictures, scale, bias
        self.loss = pictures.new_zeros((), dtype=torch.float64)
        self.for_bias = torch.zeros_like(self.loss)
        self.for_pictures = torch.zeros_like(pictures) if with_gradient else None

    def add(self, texts: Tensor, for_texts: Tensor, true: "_TruePairs") -> None:
        """Add the pairs of all pictures with the visiting `texts`; their gradient is added to `for_texts`."""
        block = CPU_BLOCK if texts.device.type == "cpu" else GPU_BLOCK
        step = min(len(texts), max(1, block // len(texts)))
        scratch = texts.new_empty(step, len(texts))
        for start in range(0, len(self.pictures), step):
            pictures = self.pictures[start : start + step]
            logits = torch.mm(pictures * self.scale, texts.T, out=scratch[: len(pictures)]).add_(self.bias)
            true.negate(logits, start)
            self.loss += functional.softplus(logits).sum()
            if self.for_pictures is not None:
                gradient = logits.sigmoid_()
                true.negate(gradient, start)
                self.for_bias += gradient.sum()
                self.for_pictures[start : start + step].addmm_(gradient, texts)
                for_texts.addmm_(gradient.T, pictures)


class _TruePairs:
    """Which pairs of pictures and visiting texts are true."""

    def __init__(self, at_home: bool, own: Tensor | None, visiting: Tensor | None) -> None:
        """`own` is (B,) or, where several texts may be true of a picture, (B, M)."""
        self.on_diagonal = at_home
        self.own, self.visiting = own, visiting
        if own is not None and visiting is not None:
            one_each = at_home and own.ndim == 1
            several = len(own.unique()) < len(own) if one_each else bool(torch.isin(own, visiting).any())
            self.on_diagonal = at_home and not several
            if not several:
                self.own = self.visiting = None

    def negate(self, pairs: Tensor, start: int) -> None:
        """Change the sign of the true ones among `pairs` (b, B), which are those of the pictures from `start` on."""
        if self.on_diagonal:
            pairs.diagonal(start).neg_()
        elif self.own is not None and self.visiting is not None:
            own = self.own[start : start + len(pairs)].reshape(len(pairs), -1)
            same = own[:, :1] == self.visiting
            for also in own.T[1:]:  # one by one: all at once would be M times the memory
                same |= also[:, None] == self.visiting
            pairs.mul_(same.to(pairs.dtype).mul_(-2).add_(1))


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pictures: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        identity: Tensor | None,
        true: Tensor | None,
        with_gradient: bool,
    ) -> Tensor:
        count = len(pictures)
        sums = _Sums(pictures, scale, bias, with_gradient)
        visiting, for_visiting, visitors = texts, torch.zeros_like(texts), identity
        for hop in range(ranks()):
            if hop:
                visiting = exchange_with_neighbour(visiting)
                for_visiting = exchange_with_neighbour(for_visiting) if with_gradient else for_visiting
                visitors = None if visitors is None else exchange_with_neighbour(visitors)
            sums.add(visiting, for_visiting, _TruePairs(hop == 0, identity if true is None else true, visitors))
        if sums.for_pictures is not None:
            for_texts = exchange_with_neighbour(for_visiting)
            # A logit is linear in scale and in its picture, so the gradient of scale can be had from the pictures'.
            for_scale = (sums.for_pictures * pictures).sum() / count
            factor = scale / count
            ctx.save_for_backward(
                sums.for_pictures * factor,
                for_texts * factor,
                for_scale.reshape(scale.shape),
                (sums.for_bias / count).to(bias.dtype).reshape(bias.shape),
            )
        return (sums.loss / count).float()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, None]:
        refuse_second_derivative()
        for_pictures, for_texts, for_scale, for_bias = (outputs[0] * gradient for gradient in ctx.saved_tensors)
        return for_pictures, for_texts, for_scale, for_bias, None, None, None
