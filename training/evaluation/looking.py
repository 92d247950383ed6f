"""What a tower looks at: attention maps of its heads, and its patches as colours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from assistant.towers import Tower


@torch.inference_mode()
def attention_maps(tower: Tower, views: Tensor) -> Tensor:
    """(B, heads, rows, columns): how much the pooled output looks at each patch, in each head; each map sums to 1.

    Where a class token pools, its attention in the last layer, that to itself and to registers left out (Caron et al.
    2021, figure 1); where SigLIP's head pools, the head's; where the mean does, the mean over all patches.

    Args:
        tower: any but a ResNet.
        views: (B, 3, H, W) uint8, of sides that its patches divide.

    Raises:
        ValueError: a ResNet, which has no attention.
    """
    if not tower.has_patch_tokens:
        raise ValueError("a ResNet has no attention to look at; its patches as colours show what it sees")
    rows, columns = tower.grid(views.shape[-2], views.shape[-1])
    head = getattr(tower.model, "head", None) if getattr(tower.model, "use_head", False) else None
    part = tower.layers[-1] if head is None else head.attention
    with _eager(tower), _captured(part) as seen:
        tower(tower.normalise(views))
    weights = seen[-1].float()  # (B, heads, queries, keys)
    patches = weights[..., weights.shape[-1] - rows * columns :]
    pools_by_token = head is None and weights.shape[-1] > rows * columns
    looked = patches[:, :, 0] if pools_by_token else patches.mean(2)
    return (looked / looked.sum(-1, keepdim=True)).unflatten(-1, (rows, columns))


@contextmanager
def _eager(tower: Tower) -> Iterator[None]:
    """Only transformers' eager attention gives its weights."""
    before = tower.model.config._attn_implementation
    tower.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.model.set_attn_implementation(before)


@contextmanager
def _captured(part: nn.Module) -> Iterator[list[Tensor]]:
    """Collects every (B, heads, queries, keys) that a module of `part` gives behind its output."""
    seen: list[Tensor] = []

    def ask_for_weights(module: nn.Module, inputs: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, settings | {"need_weights": True, "average_attn_weights": False}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].dim() == 4:
            seen.append(output[1])

    handles = [module.register_forward_hook(keep) for module in part.modules()]
    handles += [
        module.register_forward_pre_hook(ask_for_weights, with_kwargs=True)
        for module in part.modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def patch_colours(patches: Tensor) -> Tensor:
    """(..., D) features of patches as (..., 3) colours from 0 to 1: their first three principal components.

    All patches share one set of components, so that the same colour means the same thing in all of them. Each
    component points the way of its largest loading, and its outermost hundredths are cut off before it is stretched.
    Raises ValueError for fewer than four patches, which have no three components.
    """
    flat = patches.flatten(0, -2).float()
    if len(flat) < 4:
        raise ValueError(f"{len(flat)} patches have no three principal components; take a larger picture")
    centred = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    scores = centred @ (directions * largest.sign()).T
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).unflatten(0, patches.shape[:-1])
