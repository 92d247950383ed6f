"""Compute adapters in vLLM on a CPU row by row of who asked for which, so that nobody else's answer is touched.

vLLM 0.32's own way there takes the matrices of a row at the index of its adapter, and a row of the base has the index
-1: torch reads that as the last one, so that the base answers with an adapter's weights as soon as both are asked at
once (vllm-project/vllm, pull request 48421). It also gathers a whole matrix for each row, which takes gigabytes for a
prompt of a thousand tokens. Compiled models cannot branch as this does; on CPUs we start vLLM with `--enforce-eager`.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = list[tuple[int, Tensor]]  # the slot of an adapter, and the rows that asked for it


class AdapterRows(PunicaWrapperCPU):
    """vLLM's own, with the products of R ranks computed once for each adapter and for its rows alone.

    Shapes: x is (T, D), y (T, D'), matrices of all S slots (S, 1, R, D) and (S, 1, D', R); T rows of all requests.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._rows: Rows = []
        self._sampled_rows: Rows = []

    def update_metadata(self, *arguments: Any, **more: Any) -> None:
        """As vLLM's own, at the start of each step in which something has changed."""
        super().update_metadata(*arguments, **more)
        self._rows = rows_of_slots(self.token_lora_indices)
        self._sampled_rows = rows_of_slots(self.sampler_indices)

    def add_lora_linear(self, y: Tensor, *arguments: Any, **more: Any) -> None:
        """As vLLM's own; nothing at all where only the base is asked."""
        if self._rows:
            super().add_lora_linear(y, *arguments, **more)

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        for slot, rows in self._rows:
            y[rows] = scale * (x[rows].to(y.dtype) @ w_t_all[slot, 0].to(y.dtype).T)

    def _apply_expand(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool = True
    ) -> None:
        part = y[:, y_offset : y_offset + y_slice_size]
        for slot, rows in self._rows:
            more = x[rows].to(y.dtype) @ w_t_all[slot, 0].to(y.dtype).T
            part[rows] = part[rows] + more if add_inputs else more

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **more: Any
    ) -> None:
        """On word embeddings, where our adapters never stand, but vLLM asks all the same."""
        self._apply_expand(y, x, lora_b_stacked, 0, y.shape[-1], add_inputs)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **more: Any
    ) -> None:
        """On the head, of the rows that are sampled from; ours never stand there either."""
        for slot, rows in self._sampled_rows:
            ranks = scale * (x[rows] @ lora_a_stacked[slot, 0].to(x.dtype).T)
            y[rows, : lora_b_stacked.shape[-2]] += (ranks @ lora_b_stacked[slot, 0].to(x.dtype).T).to(y.dtype)


def rows_of_slots(indices: Tensor) -> Rows:
    """The rows of each slot in `indices`, (T,) slots of adapters; -1 is the base, which has none."""
    return [(slot, (indices == slot).nonzero().squeeze(1)) for slot in torch.unique(indices).tolist() if slot >= 0]
