"""How vLLM's slots fill the op."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import AdapterLRUCache

from server.engine.cpu import op, punica

WIDTHS = (6, 4)
D_IN = 8
NAME = "layers.0.qkv_proj"


class Layer:
    """As much of vLLM's fused layer as slots know of it."""

    n_slices, tp_size = 2, 1

    def __init__(self, form: op.Op, slots: int) -> None:
        self.lora_a_stacked = tuple(torch.zeros(slots, 1, 16, D_IN) for _ in WIDTHS)
        self.lora_b_stacked = tuple(torch.zeros(slots, 1, width, 16) for width in WIDTHS)
        self.batch = form.new_batch()
        self.op_layer = form.new_layer(slots, self.batch)

    def expand_packed_lora(self, a: Any, b: Any) -> Any:
        raise AssertionError("only for other groups of slices than the layer's")


def slots_of(form: op.Op) -> Any:
    """Our slots, two of them and three places on the host, without a model."""
    made = punica.OpModelManager.__new__(punica.OpModelManager)
    made.lora_config = SimpleNamespace(max_loras=2, max_cpu_loras=3)
    made.is_pooling_model, made._enable_mixed_moe_lora_format = False, False
    made.packed_modules = {}
    made.lora_index_to_id = [None, None]
    made._registered_adapters = AdapterLRUCache(3, made.deactivate_adapter)
    made._active_adapters = AdapterLRUCache(2, made._deactivate_adapter)
    made._linears = made.modules = {NAME: Layer(form, 2)}
    made._others = {}
    return made


@pytest.fixture
def manager(form: op.Op) -> Any:
    return slots_of(form)


def adapter(lora_id: int, *ranks: int | None) -> LoRAModel:
    a = [None if r is None else torch.full((r, D_IN), float(lora_id)) for r in ranks]
    b = [None if r is None else torch.ones(w, r) for w, r in zip(WIDTHS, ranks, strict=True)]
    packed = PackedLoRALayerWeights(NAME, 8, [1, 1], a, b, [1, 1])
    return LoRAModel(lora_id, 8, {NAME: packed})


def said(form: op.Op, layer: Any, slot: int) -> list[float]:
    """What a row of ones comes to in a slot."""
    form.set_rows(layer.batch, torch.tensor([0], dtype=torch.int32), [slot], [1])
    y = torch.zeros(1, sum(WIDTHS))
    form.add_lora(y, torch.ones(1, D_IN), layer.op_layer)
    return y[0].tolist()


def test_a_slot_holds_the_true_rank_of_every_slice(manager: Any, form: op.Op) -> None:
    layer = manager.modules[NAME]
    assert manager.add_adapter(adapter(1, 4, 2))
    assert manager.add_adapter(adapter(2, None, 3))
    assert manager.activate_adapter(1)
    assert manager.activate_adapter(2)
    assert not manager.activate_adapter(2)
    assert manager.lora_index_to_id == [1, 2]
    assert said(form, layer, 0) == [8 * 4.0] * 6 + [8 * 2.0] * 4
    assert said(form, layer, 1) == [0.0] * 6 + [2 * 8 * 3.0] * 4


def test_an_adapter_is_in_memory_once(manager: Any, form: op.Op) -> None:
    manager.add_adapter(adapter(1, 4, 2))
    assert form.packed_bytes() == 4 * (4 * (D_IN + 6) + 2 * (D_IN + 4))
    assert manager._registered_adapters[1].loras == {}
    manager.activate_adapter(1)
    manager.remove_adapter(1)
    gc.collect()
    assert form.packed_bytes() == 0
    assert said(form, manager.modules[NAME], 0) == [0.0] * 10
    assert manager.lora_index_to_id == [None, None]


def test_what_is_packed_in_part_is_freed(manager: Any, form: op.Op) -> None:
    manager._linears = {NAME: manager.modules[NAME], "other": manager.modules[NAME]}
    wrong = adapter(1, 4, 2)
    a, b = [torch.ones(4, 9)] * 2, [torch.ones(width, 4) for width in WIDTHS]
    wrong.loras["other"] = PackedLoRALayerWeights("other", 8, [1, 1], a, b, [1, 1])
    with pytest.raises(ValueError, match=r"other: A \[4, 9\] and B .* a layer with 8 inputs"):
        manager.add_adapter(wrong)
    assert form.packed_bytes() > 0
    del wrong
    gc.collect()
    assert form.packed_bytes() == 0
    assert not manager.list_adapters()


def test_a_slot_that_cannot_be_filled_is_not_kept(
    manager: Any, form: op.Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next request would find the adapter active, with another's weights in it."""
    manager.add_adapter(adapter(7, 4, 2))
    fill = punica.OpModelManager._fill

    def no_memory(self: Any, slot: int, packed: dict[str, int]) -> None:
        if packed:
            raise MemoryError
        fill(self, slot, packed)

    with monkeypatch.context() as patch:
        patch.setattr(punica.OpModelManager, "_fill", no_memory)
        with pytest.raises(MemoryError):
            manager.activate_adapter(7)
    assert manager.lora_index_to_id == [None, None]
    assert 7 not in manager._active_adapters
    assert manager.modules
    assert manager.activate_adapter(7)


def test_warming_up_needs_no_weights(manager: Any, form: op.Op) -> None:
    manager.add_adapter(manager.create_dummy_lora(1, 8))
    manager.add_adapter(manager.create_dummy_lora(2, 8).clone(3))
    assert manager.activate_adapter(1)
    assert manager.activate_adapter(3)
    assert said(form, manager.modules[NAME], 0) == [0.0] * 10
    manager.remove_all_adapters()
    assert manager.lora_index_to_id == [None, None]
    assert not manager.list_adapters()


def test_vllms_stacked_tensors_take_no_memory() -> None:
    stacked = punica._unfilled(torch.ones(2, 1, 16, 8, dtype=torch.bfloat16))
    assert stacked.shape == (2, 1, 16, 8)
    assert stacked.dtype == torch.bfloat16
    assert stacked.untyped_storage().nbytes() == 2
    assert not stacked.any()
