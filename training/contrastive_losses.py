"""The contrastive losses with a softmax, SimCLR's and CLIP's, in blocks of rows and with their closed-form gradient.

Both need exp(logit) of each pair twice: for the sums that normalise, and for the gradient. It is computed once and kept
while there are few pairs, and computed again where there are many, so memory stays linear in the batch. The largest
logit is not looked for: by Cauchy-Schwarz no logit passes scale * longest * longest, and exp fits into fp32 up to 70
and into fp64 up to 700, either sign.

Over R ranks each rank returns the mean loss of its own samples against everyone's, and as gradient of its own
embeddings what the losses of *all* ranks say of them. Ranks exchange embeddings and the (b,) sums; nothing is sent
going back. With parameter gradients averaged over the ranks (as DDP does) that is one process with the joined batch.
So the factor that a loss is multiplied with must be the same on each rank.

The gradients are computed along with the losses, in fp32 or better whatever comes in; there is no second derivative.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.gather import gather, others_of

FP32_BOUND, FP64_BOUND = 70.0, 700.0  # exp of these, times any batch, is still a normal number
CPU_BLOCK, GPU_BLOCK = 2**20, 2**25  # pairs worked on at once
MOST_KEPT = 2**28  # bytes of exponentials that are kept between the two passes


def nt_xent_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, equation 1): each view finds the other view of its picture among all views.

    Args:
        first, second: (B, D) embeddings of two views of the same pictures, of any length: they are made unit length.
        temperature: what cosines are divided by, above 0.

    Returns the mean over the 2B views. Raises ValueError for a temperature that is not positive or below 1/700.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature must be above 0, not {temperature}")
    views = functional.normalize(torch.cat([first, second]).float(), dim=-1)
    with torch.autocast(views.device.type, enabled=False):
        return _NTXentLoss.apply(views, 1 / temperature, _wants_gradient(views))


def clip_loss(pictures: Tensor, texts: Tensor, scale: Tensor, identity: Tensor | None = None) -> Tensor:
    """CLIP's loss (Radford et al. 2021, figure 3): each picture finds its text among all, and each text its picture.

    Args:
        pictures, texts: (B, D) embeddings of unit length; row i of both belongs together.
        scale: () what cosines are multiplied with (the exponential of the learned parameter).
        identity: (B,) int64, equal where two texts say the same; none where every text stands for itself. With
            repeated texts the target spreads evenly over all pairs that are true; the paper's target is the diagonal.

    Returns the mean of both directions. Raises ValueError when a logit could pass 700.
    """
    pictures, texts, scale = pictures.float(), texts.float(), scale.float()
    with torch.autocast(pictures.device.type, enabled=False):
        return _ClipLoss.apply(pictures, texts, scale, identity, _wants_gradient(pictures, texts, scale))


def refuse_second_derivative() -> None:
    """Raises RuntimeError when called going back with `create_graph`: a second derivative would silently be wrong.

    torch's `once_differentiable` does not see this: it asks whether the gradient that comes in has one itself.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("this loss has no second derivative: call backward without create_graph")


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Exponentials:
    """E = exp(scale * rows @ columns.T), (n, m), a block of rows at a time.

    The first `own` columns stand for samples of this rank, so their column sums and gradients are wanted too. With
    `symmetric` they are the rows themselves: no sample is paired with itself, and each pair of rows is computed once.
    """

    def __init__(
        self, rows: Tensor, columns: Tensor, scale: float, own: int, keep: bool, symmetric: bool = False
    ) -> None:
        self.rows, self.columns, self.scale, self.own, self.symmetric = rows, columns, scale, own, symmetric
        self.dtype = _precision_for(rows, columns, scale)
        pairs = len(rows) * (len(columns) - (own // 2 if symmetric else 0))
        self.keep = keep and pairs * self.dtype.itemsize <= MOST_KEPT
        block = CPU_BLOCK if rows.device.type == "cpu" else GPU_BLOCK
        self.step = max(1, block // max(1, len(columns)))
        self.kept: list[Tensor] = []

    def _blocks(self) -> Iterator[tuple[slice, int, int, Tensor]]:
        """Rows, the first column, the first column whose pairs were not met as rows (for `own`), and E of the block."""
        scratch = None if self.keep else self.rows.new_empty(min(self.step, len(self.rows)) * len(self.columns))
        for number, start in enumerate(range(0, len(self.rows), self.step)):
            rows = slice(start, min(start + self.step, len(self.rows)))
            first, mirrored = (start, rows.stop) if self.symmetric else (0, 0)
            if number < len(self.kept):
                block = self.kept[number]
            else:
                block = self._block(rows, first, scratch)
                if self.keep:
                    self.kept.append(block)
            yield rows, first, mirrored, block

    def _block(self, rows: slice, first: int, scratch: Tensor | None) -> Tensor:
        size = (rows.stop - rows.start, len(self.columns) - first)
        out = None if scratch is None else scratch[: size[0] * size[1]].view(size)
        logits = torch.mm(self.rows[rows] * self.scale, self.columns[first:].T, out=out)
        block = logits.to(self.dtype).exp_()
        if self.symmetric:
            block.diagonal().zero_()
        return block

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums over each row (n,) and over each own column (own,)."""
        row_sums = torch.empty(len(self.rows), dtype=self.dtype, device=self.rows.device)
        column_sums = torch.zeros(self.own, dtype=self.dtype, device=self.rows.device)
        for rows, first, mirrored, block in self._blocks():
            row_sums[rows] = block.sum(1)
            column_sums[mirrored:] += block[:, mirrored - first : self.own - first].sum(0)
        return row_sums, column_sums

    def weighted(self, row_weights: Tensor, column_weights: Tensor) -> tuple[Tensor, Tensor]:
        """G @ columns (n, D) and G.T @ rows (own, D), for G = E * (row weight + column weight); E is used up."""
        for_rows = torch.empty_like(self.rows)
        for_columns = torch.zeros_like(self.columns[: self.own])
        weights = torch.empty(self.step * len(self.columns), dtype=self.dtype, device=self.rows.device)
        for rows, first, mirrored, block in self._blocks():
            factor = weights[: block.numel()].view(block.shape)
            torch.add(row_weights[rows, None], column_weights[first:], out=factor)
            pairs = block.mul_(factor).to(self.rows.dtype)
            products = pairs @ self.columns[first:]
            for_rows[rows] = products
            for_columns[mirrored:].addmm_(pairs[:, mirrored - first : self.own - first].T, self.rows[rows])
        self.kept.clear()
        return for_rows, for_columns


def _precision_for(rows: Tensor, columns: Tensor, scale: float) -> torch.dtype:
    """The floating type that holds exp of each logit. Raises ValueError when none does."""
    if not rows.numel() or not columns.numel():
        return torch.float32
    bound = scale * float(rows.norm(dim=-1).max() * columns.norm(dim=-1).max())
    if bound > FP64_BOUND:
        raise ValueError(
            f"cosines are multiplied with {scale:g} and logits could reach {bound:g}, past exp's range; use a "
            f"temperature of at least 1/{FP64_BOUND:g}, and embeddings of unit length"
        )
    return torch.float32 if bound <= FP32_BOUND else torch.float64


class _NTXentLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, views: Tensor, scale: float, with_gradient: bool) -> Tensor:
        count = len(views)
        everyone = torch.cat([views, others_of(gather(views))])
        pairs = _Exponentials(views, everyone, scale, own=count, keep=with_gradient, symmetric=True)
        row_sums, column_sums = pairs.sums()
        sums = row_sums + column_sums
        partners = views.roll(count // 2, 0)
        loss = (sums.double().log() - scale * (views * partners).sum(-1)).mean()
        if with_gradient:
            weights = torch.cat([sums, others_of(gather(sums))]).reciprocal()
            for_rows, for_columns = pairs.weighted(weights[:count], weights)
            ctx.save_for_backward((for_rows + for_columns - 2 * partners) * (scale / count))
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return outputs[0] * gradient, None, None


class _ClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pictures: Tensor, texts: Tensor, scale: Tensor, identity: Tensor | None, with_gradient: bool
    ) -> Tensor:
        count, factor = len(pictures), float(scale)
        others = others_of(gather(torch.stack([pictures, texts], dim=1)))
        every_picture, every_text = torch.cat([pictures, others[:, 0]]), torch.cat([texts, others[:, 1]])
        mine = _Exponentials(pictures, every_text, factor, own=count, keep=with_gradient)
        theirs = _Exponentials(texts, others[:, 0], factor, own=0, keep=with_gradient)
        picture_sums, text_sums = mine.sums()
        text_sums = text_sums + theirs.sums()[0]
        picture_targets, text_targets = texts, pictures
        if identity is not None:
            every_identity = torch.cat([identity, others_of(gather(identity))])
            picture_targets = _mean_of_equals(every_text, every_identity)[:count]
            text_targets = _mean_of_equals(every_picture, every_identity)[:count]
        right = (pictures * picture_targets).sum(-1) + (texts * text_targets).sum(-1)
        loss = (picture_sums.double().log() + text_sums.double().log() - factor * right).mean() / 2
        if with_gradient:
            sums = torch.stack([picture_sums, text_sums], dim=1)
            weights = torch.cat([sums, others_of(gather(sums))]).reciprocal()
            for_pictures, for_texts = mine.weighted(weights[:count, 0], weights[:, 1])
            for_texts += theirs.weighted(weights[:count, 1], weights[count:, 0])[0]
            for_pictures.sub_(picture_targets, alpha=2).div_(2 * count)
            for_texts.sub_(text_targets, alpha=2).div_(2 * count)
            # A logit is linear in scale and in its picture, so the gradient of scale can be had from the pictures'.
            for_scale = (for_pictures * pictures).sum()
            ctx.save_for_backward(for_pictures * factor, for_texts * factor, for_scale.reshape(scale.shape))
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        refuse_second_derivative()
        for_pictures, for_texts, for_scale = (outputs[0] * gradient for gradient in ctx.saved_tensors)
        return for_pictures, for_texts, for_scale, None, None


def _mean_of_equals(rows: Tensor, identity: Tensor) -> Tensor:
    """For each of the (n, D) rows, the mean of those that have its identity (n,)."""
    groups, place, counts = identity.unique(return_inverse=True, return_counts=True)
    if len(groups) == len(rows):
        return rows
    sums = rows.new_zeros(len(groups), rows.shape[-1]).index_add_(0, place, rows)
    return (sums / counts[:, None])[place]
