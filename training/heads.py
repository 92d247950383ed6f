"""Small networks on top of a tower, for training alone: projection heads, prototypes."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from training.gather import gather_with_gradient, ranks

SHORTEST = 1e-12  # length of a prototype below which it is not stretched to 1, as in torch's own normalize


class BatchNormOverRanks(nn.BatchNorm1d):
    """Batch norm whose mean and variance are those of all ranks' rows together; (B, D) to (B, D).

    torch's SyncBatchNorm does the same, and only on a GPU. Each rank must bring as many rows. Raises ValueError for a
    batch of one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The normalised rows, in the type of `input`; statistics in fp32."""
        if not self.training or ranks() == 1:
            return super().forward(input)
        rows = input.float()
        mean = _mean_of_all_rows(rows)
        variance = _mean_of_all_rows((rows - mean).square())
        self._follow(mean.detach(), variance.detach(), len(rows) * ranks())
        normal = (rows - mean) * torch.rsqrt(variance + self.eps)
        if self.affine:
            normal = normal * self.weight + self.bias
        return normal.to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics, as `nn.BatchNorm1d` does: the variance there is the unbiased one."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)


def _mean_of_all_rows(rows: Tensor) -> Tensor:
    """The mean (D,) of the rows of all ranks, with gradient."""
    return gather_with_gradient(rows.mean(0, keepdim=True)).mean(0)


def mlp_head(
    input: int, hidden: int, output: int, layers: int, batch_norm: bool = True, last_norm: bool = False
) -> nn.Sequential:
    """Linear layers with ReLU between them: the projector and predictor of SimCLR and MoCo; (B, input) to (B, output).

    Args:
        input: width of what comes in.
        hidden: width between the layers.
        output: width of what goes out.
        layers: how many linear layers, at least 1.
        batch_norm: batch norm (over all ranks) before each ReLU; the linear layers then need no bias.
        last_norm: batch norm without scale and shift at the end, as in MoCo v3 (Chen et al. 2021).
    """
    if layers < 1:
        raise ValueError(f"a head has at least 1 layer, not {layers}")
    widths = [input, *[hidden] * (layers - 1), output]
    parts: list[nn.Module] = []
    for place in range(layers):
        is_last = place == layers - 1
        normalised = last_norm if is_last else batch_norm
        parts.append(nn.Linear(widths[place], widths[place + 1], bias=not normalised))
        if normalised:
            parts.append(BatchNormOverRanks(widths[place + 1], affine=not is_last))
        if not is_last:
            parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


class PrototypeHead(nn.Module):
    """DINO's head (Caron et al. 2021, appendix C): an MLP, a unit-length bottleneck, and its likeness to K prototypes.

    Prototypes are weight-normed: only their directions count, so a score is a cosine. With `lengths` each has a trained
    length beside it (the paper's code: `norm_last_layer=False`), which is better and less stable.
    """

    def __init__(
        self,
        input: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        lengths: bool = False,
    ) -> None:
        super().__init__()
        if min(prototypes, hidden, bottleneck, layers) < 1:
            raise ValueError(
                f"a prototype head needs at least one prototype, layer and channel, not prototypes={prototypes}, "
                f"hidden={hidden}, bottleneck={bottleneck}, layers={layers}"
            )
        widths = [input, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for incoming, outgoing in pairwise(widths):
            linear = nn.Linear(incoming, outgoing)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-1, 1) / bottleneck**0.5)
        self.lengths = nn.Parameter(torch.ones(prototypes)) if lengths else None

    def last_layer(self) -> list[nn.Parameter]:
        """The prototypes, and their lengths where those train."""
        return [self.prototypes] if self.lengths is None else [self.prototypes, self.lengths]

    def forward(self, features: Tensor) -> Tensor:
        """(..., input) features to (..., K) scores."""
        directions: Tensor = _UnitRows.apply(self.prototypes)
        if self.lengths is not None:
            directions = directions * self.lengths[:, None]
        return functional.linear(functional.normalize(self.mlp(features).float(), dim=-1), directions)


class _UnitRows(torch.autograd.Function):
    """Rows (K, D) at unit length; the gradient g becomes (g - u (g . u)) / length, for units u.

    Autograd's own way through a division makes several copies of the (K, D) prototypes, which took a sixth of a step.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(SHORTEST)
        units = rows / lengths
        ctx.save_for_backward(units, lengths)
        return units

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        units, lengths = ctx.saved_tensors
        along = torch.einsum("kd,kd->k", outputs[0], units)[:, None]
        return torch.addcmul(outputs[0], units, along, value=-1).div_(lengths)
