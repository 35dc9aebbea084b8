"""vLLM's LoRA layers on CPU, over our op.

vLLM 0.32's own CPU op gathers a copy of the weights per token, with -1 for a row without an
adapter; in torch -1 is the last slot, so base rows come back with somebody's adapter applied. Here
the rows are grouped by slot once a step, and rows without an adapter are in no group.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from server.engine import progress
from server.engine.cpu import op
from server.engine.staging import Tensors, slices


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
    """vLLM's slots, kept in step with the op's.

    An adapter's weights are in the op and nowhere else: `packed` of its LoRAModel has their number
    by layer. vLLM's stacked tensors have a shape, which it reads, and no memory.
    """

    modules: dict[str, Any]

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        self._linears = {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, BaseLinearLayerWithLoRA)
        }
        self._others = {k: each for k, each in self.modules.items() if k not in self._linears}
        for module in self._linears.values():
            module.op_layer = op.install().new_layer(self.lora_slots, module.punica_wrapper.batch)
        progress.passed("model", "getting it ready")

    def register_module(self, module_name: str, module: Any) -> None:
        """Called for each layer as it is made."""
        super().register_module(module_name, module)
        if isinstance(module, BaseLinearLayerWithLoRA):
            module.lora_a_stacked = tuple(map(_unfilled, module.lora_a_stacked))
            module.lora_b_stacked = tuple(map(_unfilled, module.lora_b_stacked))

    def create_dummy_lora(
        self, lora_id: int, rank: int, embedding_modules: Any = None
    ) -> LoRAModel:
        """What vLLM warms up with: an adapter of nothing, as its zeros would be."""
        return LoRAModel(lora_id, rank, {})

    def _add_adapter(self, lora: LoRAModel) -> None:
        if lora.loras:
            self._validate_moe_lora_format(lora)
            self._create_merged_loras_inplace(lora)
            self.pack(lora)
        self._registered_adapters[lora.id] = lora

    def pack(self, lora: LoRAModel, pause: Callable[[], None] = lambda: None) -> None:
        """Moves a merged adapter's weights into the op. In any thread; `pause` is called often.

        Raises:
            ValueError: they do not fit the base.
        """
        lora.packed = {}
        # The finalizer has the numbers as they are then: also those of an adapter packed in part.
        weakref.finalize(lora, _free, lora.packed).atexit = False
        for name, module in self._linears.items():
            found = self._get_lora_layer_weights(lora, name)
            if found is not None:
                lora.packed[name] = _pack(module, *slices(name, module, found))
                pause()
        found_others = {name: self._get_lora_layer_weights(lora, name) for name in self._others}
        lora.loras = {name: found for name, found in found_others.items() if found is not None}

    def activate_adapter(self, lora_id: int) -> bool:
        """Puts an adapter into a slot."""
        modules, self.modules = self.modules, self._others
        try:
            activated: bool = super().activate_adapter(lora_id)
            if activated:
                packed = getattr(self._registered_adapters[lora_id], "packed", {})
                self._fill(self.lora_index_to_id.index(lora_id), packed)
        except BaseException:
            # A slot filled in part would pass for a whole one the next time it is asked for.
            self.deactivate_adapter(lora_id)
            raise
        finally:
            self.modules = modules
        return activated

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self._fill(self.lora_index_to_id.index(lora_id), {})
        super()._deactivate_adapter(lora_id)

    def _fill(self, slot: int, packed: Mapping[str, int]) -> None:
        set_slot = op.install().set_slot
        for name, module in self._linears.items():
            set_slot(module.op_layer, slot, packed.get(name, 0))


def in_use(manager: Any) -> bool:
    """Whether vLLM's layers and slots are ours in this process, `manager` being its slots."""
    applies = BaseLinearLayerWithLoRA._apply_lora_to_output
    return isinstance(manager, OpModelManager) and applies is apply_adapters


def _unfilled(stacked: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape that takes one number's memory."""
    return stacked.new_zeros(()).expand(stacked.shape)


def _pack(module: Any, a: Tensors, b: Tensors) -> int:
    """Hands A [rank, d_in] and B [width, rank] of each slice of a layer to the op."""
    widths = [each.shape[-2] for each in module.lora_b_stacked]
    no_a = module.lora_a_stacked[0].new_empty(0, module.lora_a_stacked[0].shape[-1])
    return op.install().pack(
        [no_a if each is None else each for each in a],
        [
            no_a.new_empty(0, w) if each is None else each.T
            for each, w in zip(b, widths, strict=True)
        ],
        [sum(widths[:i]) for i in range(len(widths))],
    )


def _free(packed: dict[str, int]) -> None:
    op.install().free(list(packed.values()))


def apply_adapters(self: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Takes the place of `BaseLinearLayerWithLoRA._apply_lora_to_output`: output += ΔW·x."""
    rows = output.view(-1, output.shape[-1]) if output.ndim > 2 else output
    inputs = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x
    torch.ops.loraplex.add_lora(rows, inputs, self.op_layer)
    return output
