"""The losses by which a student learns from its teacher's scores of prototypes, and KoLeo, which spreads features."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from training.gather import gather, gather_with_gradient, mean_over_ranks, rank, sum_over_ranks

# Scores worked on at once: on a CPU they stay in the cache between the steps of the formula, on a GPU launches count.
CPU_BLOCK = 2**18
GPU_BLOCK = 2**28


def crops_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """DINO's loss (Caron et al. 2021, equation 3): the mean cross-entropy of all pairs of different crops.

    Args:
        student: (B, S, K) scores of the student; its first G crops are those that the teacher saw.
        teacher: (B, G, K) probabilities of the teacher, G <= S.
        temperature: of the student.

    Cross-entropy is linear in its target. So the teacher's probabilities are averaged over the crops that a student's
    crop is compared with, and each student crop has one cross-entropy instead of one a pair. fp32 inside. Raises
    ValueError when no pair is left.
    """
    samples, crops, _ = student.shape
    teachers = teacher.shape[1]
    pairs = teachers * (crops - 1)
    if not 0 < teachers <= crops or pairs == 0:
        raise ValueError(f"{teachers} teacher crops and {crops} student crops leave no pair of different crops")
    teacher = teacher.float()
    targets, spans = [], []
    for place in range(teachers if teachers > 1 else 0):
        others = [other for other in range(teachers) if other != place]
        targets.append(teacher[:, others[0]] if len(others) == 1 else teacher[:, others].mean(1))
        spans.append(slice(place, place + 1))
    if crops > teachers:
        targets.append(teacher.mean(1))
        spans.append(slice(teachers, crops))
    met = [teachers - 1] * teachers + [teachers] * (crops - teachers)
    weights = torch.tensor(met, dtype=torch.float32, device=student.device) / (pairs * samples)
    return _SoftCrossEntropy.apply(student, weights.expand(samples, crops), temperature, spans, *targets)


def patches_loss(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """iBOT's loss on hidden patches (Zhou et al. 2022, equation 2): the weighted sum of their cross-entropies.

    Args:
        student: (M, K) scores of the student for M hidden patches; M may be 0.
        teacher: (M, K) probabilities of the teacher, which saw these patches.
        weights: (M,). In DINOv2 it is 1 / (hidden patches of the same crop) / (crops, those with none hidden too).
        temperature: of the student.

    fp32 inside.
    """
    return _SoftCrossEntropy.apply(student[:, None], weights[:, None], temperature, [slice(0, 1)], teacher.float())


class _SoftCrossEntropy(torch.autograd.Function):
    """Sum of weight x (log sum exp(scores / temperature) - target . scores / temperature), targets summing to 1.

    The gradient is the closed form weight x (softmax - target) / temperature. Of the (B, S, K) scores only the
    normalisers are kept besides the scores themselves, and they are worked on in blocks.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, weights: Tensor, temperature: float, spans: Sequence[slice], *targets: Tensor
    ) -> Tensor:
        samples, crops, _ = scores.shape
        sharpness = 1.0 / temperature
        agreement = scores.new_zeros((samples, crops), dtype=torch.float32)
        normalisers = torch.full_like(agreement, -torch.inf)
        for rows, columns in _blocks(scores):
            scaled = scores[rows, :, columns].float() * sharpness
            for span, target in zip(spans, targets, strict=True):
                agreement[rows, span] += (scaled[:, span] * target[rows, None, columns]).sum(-1)
            normalisers[rows] = torch.logaddexp(normalisers[rows], scaled.logsumexp(-1))
        ctx.save_for_backward(scores, weights, normalisers, *targets)
        ctx.sharpness, ctx.spans = sharpness, spans
        return (weights.float() * (normalisers - agreement)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scores, weights, normalisers, *targets = ctx.saved_tensors
        factors = (weights.float() * (outputs[0].float() * ctx.sharpness))[..., None]
        gradient = torch.empty_like(scores)
        for rows, columns in _blocks(scores):
            block = gradient[rows, :, columns]
            part = block if block.dtype == torch.float32 else torch.empty_like(block, dtype=torch.float32)
            torch.add(-normalisers[rows, :, None], scores[rows, :, columns].float(), alpha=ctx.sharpness, out=part)
            part.exp_()
            for span, target in zip(ctx.spans, targets, strict=True):
                part[:, span].sub_(target[rows, None, columns])
            part.mul_(factors[rows])
            if part is not block:
                block.copy_(part)
        return gradient, None, None, None, *[None] * len(targets)


def _blocks(scores: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of (B, S, K) scores, in blocks of a size that suits the device."""
    samples, crops, prototypes = scores.shape
    size = CPU_BLOCK if scores.device.type == "cpu" else GPU_BLOCK
    columns = math.ceil(prototypes / math.ceil(prototypes * crops / size))
    rows = max(1, size // (crops * columns))
    for row in range(0, samples, rows):
        for column in range(0, prototypes, columns):
            yield slice(row, row + rows), slice(column, column + columns)


class Centre(nn.Module):
    """The running mean of a teacher's scores, taken off them so that no prototype wins always (DINO, equation 4)."""

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.value: Tensor
        self.register_buffer("value", torch.zeros(prototypes))
        self._newest: Tensor | None = None

    @torch.no_grad()
    def probabilities(self, scores: Tensor, temperature: float) -> Tensor:
        """(..., K) scores to probabilities of the teacher: softmax((scores - centre) / temperature), fp32."""
        return (scores.float() - self.value).mul_(1.0 / temperature).softmax(-1)

    @torch.no_grad()
    def remember(self, scores: Tensor) -> None:
        """Keep the mean of (..., K) scores of a step for `update`."""
        self._newest = scores.float().flatten(0, -2).mean(0)

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the mean over all ranks of what was remembered since the last call; without any, stay."""
        if self._newest is not None:
            self.value.lerp_(mean_over_ranks(self._newest), 1.0 - self.momentum)
            self._newest = None


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Probabilities (B, K) from scores (B, K) such that every prototype is used alike by the samples of all ranks.

    The centring of SwAV (Caron et al. 2020, section 3.1) that DINOv2 takes over: exp(scores / temperature) is scaled to
    equal sums per prototype, then to 1 per sample, `iterations` times. Ranks may bring differing numbers of samples,
    even none, but each must call. Only the two scaling vectors are iterated: the result is the same, and the matrix is
    written once. fp32 inside.
    """
    matrix = scores.float() * (1.0 / temperature)
    # Highest 0 for each prototype, then for each sample: nothing overflows, and none of the sums below underflows.
    lowest = matrix.new_full((1, matrix.shape[1]), -torch.inf)
    matrix.sub_(gather(torch.cat([lowest, matrix]).amax(0, keepdim=True)).amax(0))
    of_sample = matrix.amax(1)
    matrix.sub_(of_sample[:, None]).exp_()
    of_sample.exp_()
    of_prototype = matrix.new_ones(matrix.shape[1])
    with torch.autocast(scores.device.type, enabled=False):
        for _ in range(iterations):
            of_prototype = 1.0 / sum_over_ranks(of_sample @ matrix)
            of_prototype /= of_prototype.amax()  # a common factor falls out, and would grow with each iteration
            of_sample = 1.0 / (matrix @ of_prototype)
    return matrix.mul_(of_prototype).mul_(of_sample[:, None])


def koleo_loss(features: Tensor, epsilon: float = 1e-8) -> Tensor:
    """KoLeo (Sablayrolles et al. 2019, equation 4): minus the mean log distance of features to their nearest neighbour.

    Args:
        features: (B, D) of this rank's samples; they are brought to unit length. Neighbours are sought among the
            samples of all ranks. DINOv2's code looks at one rank only, and so depends on how many there are.
        epsilon: keeps the logarithm finite where two features are equal.

    fp32 inside. Raises ValueError for a single sample, which has no neighbour.
    """
    local = functional.normalize(features.float(), dim=-1, eps=epsilon)
    everyone = gather_with_gradient(local)
    if len(everyone) < 2:
        raise ValueError("KoLeo needs at least two samples a step: one has no neighbour; raise the batch size")
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        likeness = local @ everyone.T
        own = torch.arange(len(local), device=local.device)
        likeness[own, own + rank() * len(local)] = -torch.inf
        nearest = likeness.argmax(1)
    distances = functional.pairwise_distance(local, everyone[nearest], p=2.0, eps=epsilon)
    return -(distances + epsilon).log().mean()
