"""Have vLLM on a CPU compute RMS norms by its own C++ kernels, which it keeps there and never calls.

vLLM 0.32 leaves norms on CPUs to plain torch, nine operations each, for it counts on `torch.compile` to fuse them. With
adapters nothing is compiled (`serving.cpu_adapters`), and the norms of a small model are a tenth of all its work.
"""

import torch
from torch import Tensor
from vllm import ir
from vllm.config.kernel import IrOpPriorityConfig
from vllm.platforms import current_platform

KERNELS = "kangaroo_cpu"  # vLLM's name for a set of implementations
MULTIPLE = 8  # of the width; they read so many numbers at once


def _fit(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    """Whether the kernels can take it: whole rows that lie one after the other, in one type of numbers."""
    whole = variance_size is None and weight is not None and weight.dtype == x.dtype
    return whole and x.is_contiguous() and x.shape[-1] % MULTIPLE == 0


def _fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _fit(x, weight, variance_size)


def _fits_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fit(x, weight, variance_size) and x_residual.dtype == x.dtype and x_residual.is_contiguous()


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) x weight over the last dimension of x (..., D), in fp32 (Zhang & Sennrich 2019)."""
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, weight, epsilon)
    return normed


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of x + x_residual, and that sum; both are written into what was given."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def use_kernels() -> None:
    """Register the kernels in this process of vLLM, and prefer them to plain torch where they fit. Once a process."""
    ir.ops.rms_norm.register_impl(KERNELS, supports_args=_fits)(rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(KERNELS, supports_args=_fits_sum, inplace=True)(fused_add_rms_norm)
    current_platform.get_default_ir_op_priority = _priority  # type: ignore[assignment, method-assign]


def _priority(config: object) -> IrOpPriorityConfig:
    norms = {name: [KERNELS, "native"] for name in ("rms_norm", "fused_add_rms_norm")}
    return IrOpPriorityConfig.with_default(["native"], **norms)
