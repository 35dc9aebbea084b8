"""vLLM's LoRA layers on CPU, over our op.

vLLM 0.32's own CPU op gathers a copy of the weights per token, with -1 for a row without an
adapter; in torch -1 is the last slot, so base rows come back with somebody's adapter applied. Here
the rows are grouped by slot once a step, and rows without an adapter are in no group.
"""

from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from server.engine import progress
from server.engine.cpu import op


def group_rows(slots: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
    """`slots` [rows], int64, the slot of each row or -1 → rows by slot, and each slot's number.

    Returns rows [n] int32 (of slot after slot, ascending in each), the slots used, and how many
    rows each has.
    """
    rows = torch.argsort(slots, stable=True)
    used, counts = torch.unique_consecutive(slots[rows], return_counts=True)
    if len(used) and used[0] < 0:
        rows, used, counts = rows[int(counts[0]) :], used[1:], counts[1:]
    return rows.int(), used.tolist(), counts.tolist()


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's per-step state of the LoRA op: which rows use which slot."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups: list[tuple[int, torch.Tensor]] = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM before a step whose rows or slots differ from the last one's."""
        super().update_metadata(*args, **kwargs)
        self.set_rows(*group_rows(self.token_lora_indices))

    def set_rows(self, rows: torch.Tensor, slots: list[int], counts: list[int]) -> None:
        """Takes over the rows of the next step."""
        self._groups = list(zip(slots, rows.long().split(counts), strict=True))

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += scale · x · A[i]ᵀ · B[i]ᵀ for every slice i of a fused layer."""
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            columns = slice(start, start + width)
            for slot, rows in self._groups:
                bt = scale * b[slot, 0].T
                y[rows, columns] = op.add_delta(y[rows, columns], x[rows], a[slot, 0], bt)
            start += width

    def _unused(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Loraplex applies adapters to whole linear layers only")

    # vLLM's forms of these give base rows the last slot's adapter.
    add_shrink = add_expand = add_lora_embedding = add_lora_logits = _unused


class OpPunicaWrapper(GroupedPunicaWrapper):
    """The same for the op, which has its own copy of the rows and of the weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch = op.install().new_batch()

    def set_rows(self, rows: torch.Tensor, slots: list[int], counts: list[int]) -> None:
        """Hands the rows to the op."""
        op.install().set_rows(self.batch, rows, slots, counts)

    add_lora_linear = GroupedPunicaWrapper._unused  # layers call the op


class OpModelManager(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's slots, kept in step with the op's."""

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        for module in self.modules.values():
            if isinstance(module, BaseLinearLayerWithLoRA):
                module.op_layer = op.install().new_layer(
                    self.lora_slots, module.punica_wrapper.batch
                )
        progress.passed("model", "getting it ready")

    def activate_adapter(self, lora_id: int) -> bool:
        """Puts an adapter into a slot, at its true rank, in the order the op reads it."""
        try:
            activated: bool = super().activate_adapter(lora_id)
            if activated:
                self._fill_op(lora_id)
        except BaseException:
            # A slot filled in part would pass for a whole one the next time it is asked for.
            self.remove_adapter(lora_id)
            raise
        return activated

    def _fill_op(self, lora_id: int) -> None:
        slot = self.lora_index_to_id.index(lora_id)
        adapter = self._registered_adapters[lora_id]
        for name, module in self.modules.items():
            if isinstance(module, BaseLinearLayerWithLoRA):
                _set_slot(module, slot, self._get_lora_layer_weights(adapter, name))


def in_use(manager: Any) -> bool:
    """Whether vLLM's layers and slots are ours in this process, `manager` being its slots."""
    applies = BaseLinearLayerWithLoRA._apply_lora_to_output
    return isinstance(manager, OpModelManager) and applies is apply_adapters


def _set_slot(module: Any, slot: int, weights: Any) -> None:
    """Copies what vLLM has put into `slot` of a layer (sliced for tensor parallelism) to the op."""
    ranks = _ranks(weights, module.n_slices)
    a = [each[slot, 0, :rank] for each, rank in zip(module.lora_a_stacked, ranks, strict=True)]
    b = [each[slot, 0, :, :rank].T for each, rank in zip(module.lora_b_stacked, ranks, strict=True)]
    widths = [each.shape[1] for each in b]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    op.install().set_slot(
        module.op_layer, slot, torch.cat(a), [each.contiguous() for each in b], starts
    )


def _ranks(weights: Any, slices: int) -> list[int]:
    """True rank of each slice; all beyond it is zeros."""
    if weights is None:
        return [0] * slices
    if isinstance(weights.lora_a, list) and len(weights.lora_a) == slices:
        return [0 if a is None else a.shape[0] for a in weights.lora_a]
    several = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
    return [max(a.shape[0] for a in several if a is not None)] * slices


def apply_adapters(self: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Takes the place of `BaseLinearLayerWithLoRA._apply_lora_to_output`: output += ΔW·x."""
    rows = output.view(-1, output.shape[-1]) if output.ndim > 2 else output
    inputs = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x
    torch.ops.loraplex.add_lora(rows, inputs, self.op_layer)
    return output
