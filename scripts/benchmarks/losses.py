"""Our losses beside the peers', forward and backward, on the same random inputs.

Embeddings are as wide as the papers': 128 for SimCLR, 512 for CLIP and SigLIP, 384 (ViT-S) for KoLeo.
"""

from collections.abc import Callable

import lightly.loss
import open_clip.loss
import torch
from torch import Tensor
from torch.nn import functional

from scripts.benchmarks.measuring import Pair, Work
from training.contrastive_losses import clip_loss, nt_xent_loss
from training.distillation_losses import Centre, crops_loss, koleo_loss, patches_loss
from training.sigmoid_loss import sigmoid_loss

TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.04
TOLERANCE = 1e-4  # sums over millions of fp32 numbers in another order


def forward_and_backward(loss: Callable[..., Tensor], *inputs: Tensor) -> Work:
    """The work of computing `loss` of `inputs` and its gradient for each of them, from scratch each time."""

    def work() -> Tensor:
        leaves = [value.detach().requires_grad_() for value in inputs]
        value = loss(*leaves)
        value.backward()
        return value.detach()

    return work


def nt_xent(batch: int, device: torch.device) -> Pair:
    """SimCLR's loss. Both sides normalise the views themselves."""
    first, second = torch.randn(2, batch, 128, device=device)
    theirs = lightly.loss.NTXentLoss(temperature=TEMPERATURE)
    return Pair(
        name=f"NT-Xent loss, B = {batch}",
        peer="lightly",
        ours=forward_and_backward(lambda a, b: nt_xent_loss(a, b, TEMPERATURE), first, second),
        theirs=forward_and_backward(theirs, first, second),
        tolerance=TOLERANCE,
        lever="closed-form gradient, blocks, each pair once",
    )


def _units(batch: int, device: torch.device) -> Tensor:
    """(2, batch, 512) embeddings of unit length."""
    return functional.normalize(torch.randn(2, batch, 512, device=device), dim=-1)


def clip(batch: int, device: torch.device) -> Pair:
    """CLIP's loss, with the gradient of the temperature."""
    pictures, texts = _units(batch, device)
    scale = torch.tensor(1 / 0.07, device=device)
    return Pair(
        name=f"CLIP loss, B = {batch}",
        peer="open_clip",
        ours=forward_and_backward(clip_loss, pictures, texts, scale),
        theirs=forward_and_backward(open_clip.loss.ClipLoss(), pictures, texts, scale),
        tolerance=TOLERANCE,
        lever="closed-form gradient, one exponential a pair for both directions",
    )


def siglip(batch: int, device: torch.device) -> Pair:
    """SigLIP's loss, with the gradients of temperature and bias."""
    pictures, texts = _units(batch, device)
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-10.0, device=device)
    return Pair(
        name=f"SigLIP loss, B = {batch}",
        peer="open_clip",
        ours=forward_and_backward(sigmoid_loss, pictures, texts, scale, bias),
        theirs=forward_and_backward(open_clip.loss.SigLipLoss(), pictures, texts, scale, bias),
        tolerance=TOLERANCE,
        lever="blocks with their gradient: no (B, B) matrix is kept",
    )


def dino(samples: int, crops: int, prototypes: int, device: torch.device) -> Pair:
    """DINO's loss of two crops of the teacher and `crops` of the student, with the teacher's softmax and its centre."""
    student = torch.randn(samples, crops, prototypes, device=device)
    teacher = torch.randn(samples, 2, prototypes, device=device)
    centre = Centre(prototypes, momentum=0.9).to(device)

    def ours(scores: Tensor) -> Tensor:
        centre.remember(teacher)
        return crops_loss(scores, centre.probabilities(teacher, TEACHER_TEMPERATURE), TEMPERATURE)

    criterion = lightly.loss.DINOLoss(prototypes, student_temp=TEMPERATURE).to(device)
    # lightly takes a list of crops, and moves its centre in each call: put back, so that each call is the first.
    still = criterion.center.clone()
    teacher_crops = [crop.contiguous() for crop in teacher.unbind(1)]

    def theirs(*scores: Tensor) -> Tensor:
        criterion.center.data = still
        return criterion(teacher_crops, list(scores), teacher_temp=TEACHER_TEMPERATURE)

    return Pair(
        name=f"DINO loss, B = {samples}, K = {prototypes}",
        peer="lightly",
        ours=forward_and_backward(ours, student),
        theirs=forward_and_backward(theirs, *(crop.contiguous() for crop in student.unbind(1))),
        tolerance=TOLERANCE,
        lever="one cross-entropy a student crop, closed-form gradient, blocks",
    )


def ibot(samples: int, prototypes: int, device: torch.device) -> Pair:
    """iBOT's loss on 8 hidden patches of each of `samples` crops, with the teacher's softmax and its centre."""
    side, hidden = 14, 8
    mask = torch.zeros(samples, side * side, dtype=torch.bool, device=device)
    mask[:, :hidden] = True
    mask = mask.view(samples, side, side)
    student, teacher = torch.randn(2, samples * hidden, prototypes, device=device)
    weights = torch.full((samples * hidden,), 1 / (samples * hidden), device=device)
    centre = Centre(prototypes, momentum=0.9).to(device)

    def ours(scores: Tensor) -> Tensor:
        centre.remember(teacher)
        return patches_loss(scores, centre.probabilities(teacher, TEACHER_TEMPERATURE), weights, TEMPERATURE)

    criterion = lightly.loss.IBOTPatchLoss(prototypes, TEACHER_TEMPERATURE, TEMPERATURE).to(device)
    still = criterion.center.center.clone()

    def theirs(scores: Tensor) -> Tensor:
        criterion.center.center = still
        return criterion(teacher, scores, mask)

    return Pair(
        name=f"iBOT loss, {samples * hidden} patches, K = {prototypes}",
        peer="lightly",
        ours=forward_and_backward(ours, student),
        theirs=forward_and_backward(theirs, student),
        tolerance=TOLERANCE,
        lever="closed-form gradient, blocks",
    )


def koleo(samples: int, device: torch.device) -> Pair:
    """KoLeo, which spreads features."""
    features = torch.randn(samples, 384, device=device)
    return Pair(
        name=f"KoLeo loss, B = {samples}",
        peer="lightly",
        ours=forward_and_backward(koleo_loss, features),
        theirs=forward_and_backward(lightly.loss.KoLeoLoss(), features),
        tolerance=TOLERANCE,
        lever="none: the same steps",
    )
