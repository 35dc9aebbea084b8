"""The LoRA op on CPU: ΔW·x for every row of a batch, each row with its own adapter or with none.

vLLM 0.32's own CPU op gathers a copy of the weights per token, with -1 for a row without an
adapter; in torch -1 is the last slot, so base rows come back with somebody's adapter applied.
Here the rows are grouped by slot once a step, each group is one matrix product, and rows without
an adapter are in no group: nothing reads or writes them.
"""

from typing import Any, TypeAlias

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows: TypeAlias = slice | torch.Tensor
Group: TypeAlias = tuple[int, Rows]


def group_rows(slots: torch.Tensor) -> list[Group]:
    """Rows of each slot that is used: `slots` [rows], int64, slot of each row or -1 for none.

    The rows are a slice where they are neighbours (a view, no copy) and indices where not.
    """
    groups: list[Group] = []
    for slot in torch.unique(slots).tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero().flatten()
        first, last = int(rows[0]), int(rows[-1])
        together = last - first + 1 == len(rows)
        groups.append((slot, slice(first, last + 1) if together else rows))
    return groups


def shrink(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, groups: list[Group], scale: float
) -> None:
    """out[rows] = scale · x[rows] · A[slot]ᵀ for each group, in fp32.

    out [rows, rank] fp32, x [rows, d_in], a [slots, 1, rank, d_in]. Other rows keep their value.
    """
    for slot, rows in groups:
        out[rows] = scale * (x[rows].float() @ a[slot].view(-1, a.shape[-1]).float().T)


def expand(
    out: torch.Tensor, h: torch.Tensor, b: torch.Tensor, groups: list[Group], add: bool = True
) -> None:
    """out[rows] += h[rows] · B[slot]ᵀ for each group, summed in fp32, rounded once to out's dtype.

    out [rows, ≥ d_out], h [rows, rank], b [slots, 1, d_out, rank]. Other rows keep their value;
    `add=False` replaces instead.
    """
    for slot, rows in groups:
        weights = b[slot].view(-1, b.shape[-1])
        width = min(weights.shape[0], out.shape[-1])  # vLLM pads one or the other
        delta = (h[rows].float() @ weights.float().T)[:, :width]
        old = out[rows, :width].float() if add else 0.0
        out[rows, :width] = (old + delta).to(out.dtype)


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's per-step state of the LoRA op, with our grouping and our two products."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM once before each step; groups the step's tokens and its samples."""
        super().update_metadata(*args, **kwargs)
        self._groups = group_rows(self.token_lora_indices)
        self._sample_groups = group_rows(self.sampler_indices)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[i] = scale · x · A[i]ᵀ for every slice i of a fused layer."""
        x = x.view(-1, x.shape[-1])
        for out, a in zip(y, lora_a_stacked, strict=True):
            shrink(out.view(-1, out.shape[-1]), x, a, self._groups, scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += x[i] · B[i]ᵀ for every slice i of a fused layer."""
        y = y.view(-1, y.shape[-1])
        start = offset_start
        for h, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
            expand(y[:, start : start + width], h, b, self._groups, add_inputs)
            start += width

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y += x · Bᵀ, where x are the rows of A that the tokens picked."""
        expand(y.view(-1, y.shape[-1]), x, lora_b_stacked, self._groups, add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y += scale · x · Aᵀ · Bᵀ, one row a sample instead of one a token."""
        x = x.view(-1, x.shape[-1])
        h = x.new_zeros((x.shape[0], lora_b_stacked.shape[-1]), dtype=torch.float32)
        shrink(h, x, lora_a_stacked, self._sample_groups, scale)
        expand(y.view(-1, y.shape[-1]), h, lora_b_stacked, self._sample_groups)
