"""How vLLM's slots fill the op."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from server.engine.cpu import op, punica


def lora(*ranks: int | None) -> Any:
    weights = [None if rank is None else torch.zeros(rank, 8) for rank in ranks]
    return SimpleNamespace(lora_a=weights)


@pytest.mark.parametrize(
    ("weights", "slices", "ranks"),
    [
        (None, 3, [0, 0, 0]),
        (SimpleNamespace(lora_a=torch.zeros(16, 8)), 1, [16]),
        (SimpleNamespace(lora_a=torch.zeros(16, 8)), 3, [16, 16, 16]),
        (lora(4, None, 8), 3, [4, 0, 8]),
        (lora(4, 8), 3, [8, 8, 8]),
    ],
)
def test_true_ranks(weights: Any, slices: int, ranks: list[int]) -> None:
    assert punica._ranks(weights, slices) == ranks


def test_a_slot_that_cannot_be_filled_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next request would find the adapter active, with another's weights in it."""
    removed = []
    monkeypatch.setattr(LRUCacheLoRAModelManager, "activate_adapter", lambda *_: True)
    monkeypatch.setattr(
        LRUCacheLoRAModelManager, "remove_adapter", lambda _, lora_id: removed.append(lora_id)
    )

    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(punica.OpModelManager, "_fill_op", no_memory)
    manager = punica.OpModelManager.__new__(punica.OpModelManager)
    with pytest.raises(MemoryError):
        manager.activate_adapter(7)
    assert removed == [7]


def test_a_slot_holds_the_true_rank_of_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM pads to the highest rank; what is beyond an adapter's own is not even copied."""
    given: list[Any] = []
    monkeypatch.setattr(op, "install", lambda: SimpleNamespace(set_slot=lambda *a: given.append(a)))
    a = tuple(torch.randn(2, 1, 16, 8) for _ in range(2))
    b = tuple(torch.randn(2, 1, width, 16) for width in (6, 4))
    module = SimpleNamespace(op_layer=5, n_slices=2, lora_a_stacked=a, lora_b_stacked=b)
    punica._set_slot(module, 1, lora(4, 2))
    ((layer, slot, got_a, got_b, starts),) = given
    assert (layer, slot, starts) == (5, 1, [0, 6])
    assert torch.equal(got_a, torch.cat([a[0][1, 0, :4], a[1][1, 0, :2]]))
    for got, want, rank in zip(got_b, b, (4, 2), strict=True):
        assert torch.equal(got, want[1, 0, :, :rank].T)
