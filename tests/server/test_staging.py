"""Adapters staged off the step: real files and threads, our slots, no engine."""

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.engine.exceptions import EngineDeadError

from server.engine import plugin, staging
from server.engine.cpu import op
from server.engine.loading import Loader, LoadFailed
from tests.server.test_punica import D_IN, NAME, WIDTHS, said, slots_of

LONG_S = 20


def worker_of(form: op.Op) -> Any:
    """vLLM's own loader over our slots, as far as it looks at them."""
    manager = slots_of(form)
    manager.lora_config = LoRAConfig(
        max_loras=2, max_cpu_loras=3, max_lora_rank=16, lora_dtype=torch.float32
    )
    manager.supported_lora_modules = ["qkv_proj"]
    manager.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj"]}
    manager.packed_modules = {NAME: [NAME.replace("qkv", each) for each in "qk"]}
    manager.model, manager.device = object(), torch.device("cpu")
    manager.moe_ep_load_spec = manager._classification_head = manager._pooling_task = None
    worker = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    worker._adapter_manager, worker.lora_config = manager, manager.lora_config
    worker.max_position_embeddings, worker.vocab_size = 64, 100
    return worker


@pytest.fixture
def staged(form: op.Op) -> staging.Staging:
    return staging.Staging(worker_of(form))


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(value)`: the folder of an adapter for both slices, with `value` everywhere in A."""

    def folder(value: float, rank: int = 4, says: int | None = None, d_in: int = D_IN) -> str:
        into = tmp_path / f"{value}-{rank}-{says}-{d_in}"
        into.mkdir(exist_ok=True)
        config = {"r": says or rank, "lora_alpha": says or rank, "target_modules": ["q_proj"]}
        (into / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        tensors = {}
        for name, width in zip(("q_proj", "k_proj"), WIDTHS, strict=True):
            key = f"base_model.model.layers.0.{name}.lora_"
            tensors[f"{key}A.weight"] = torch.full((rank, d_in), float(value))
            tensors[f"{key}B.weight"] = torch.ones(width, rank)
        save_file(tensors, into / "adapter_model.safetensors")
        return str(into)

    return folder


def taken(staged: staging.Staging, adapter: int) -> dict[str, str]:
    deadline = time.monotonic() + LONG_S
    while (answer := staged.take(adapter))["state"] == "reading":
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return answer


THERE = {"state": "there", "error": ""}


def test_from_the_file_to_the_slot(staged: staging.Staging, form: op.Op, write: Write) -> None:
    before = staging.Unasked.times
    staged.stage(5, write(2.0))
    assert staged.resident() == {
        "host": [], "slots": [None, None], "reading": [5], "unasked": before,
    }  # fmt: skip
    assert taken(staged, 5) == staged.take(5) == THERE
    assert staged.slot(5, None) == staged.slot(5, None) == staged.slot(5, 5) == THERE
    assert staged.resident() == {
        "host": [5], "slots": [5, None], "reading": [], "unasked": before,
    }  # fmt: skip
    layer = staged._manager.modules[NAME]
    assert said(form, layer, 0) == [2.0 * D_IN * 4] * sum(WIDTHS)
    staged.stage(6, write(3.0))
    assert taken(staged, 6) == THERE
    assert staged.slot(6, 5) == THERE
    assert said(form, layer, 0) == [3.0 * D_IN * 4] * sum(WIDTHS)
    assert staged.resident()["host"] == [5, 6]
    staged.drop([5, 6, 99])
    assert staged.resident() == {
        "host": [], "slots": [None, None], "reading": [], "unasked": before,
    }  # fmt: skip
    freed(form)


def freed(form: op.Op) -> None:
    """Waits until the thread has given back all that was packed."""
    deadline = time.monotonic() + LONG_S
    while form.packed_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_order_of_things_is_not_taken_for_granted(
    staged: staging.Staging, write: Write
) -> None:
    assert staged.take(1)["state"] == "failed"
    assert staged.slot(1, None) == {"state": "failed", "error": "it is not on the host"}
    staged.stage(1, write(1.0))
    staged.stage(1, write(1.0))
    assert taken(staged, 1) == THERE
    staged.stage(1, write(1.0))
    assert staged.take(1) == THERE
    assert staged.resident()["reading"] == []


def test_neither_host_nor_slots_are_overfilled(staged: staging.Staging, write: Write) -> None:
    before = staging.Unasked.times
    for each in (1, 2, 3, 4):
        staged.stage(each, write(each))
        answer = taken(staged, each)
    assert answer == {"state": "failed", "error": "there is no place for it on the host"}
    staged.drop([1])
    assert staged.take(4) == THERE
    assert [staged.slot(each, None)["state"] for each in (2, 3, 4)] == ["there", "there", "failed"]
    assert staged.slot(4, 2) == THERE
    assert staged.resident() == {
        "host": [2, 3, 4], "slots": [4, 3], "reading": [], "unasked": before,
    }  # fmt: skip


def cut(path: str) -> None:
    os.truncate(Path(path, "adapter_model.safetensors"), 300)


def remove_weights(path: str) -> None:
    Path(path, "adapter_model.safetensors").unlink()


def break_config(path: str) -> None:
    Path(path, "adapter_config.json").write_text("{")


def for_another_layer(path: str) -> None:
    key = "base_model.model.layers.0.gate_proj.lora_"
    tensors = {f"{key}A.weight": torch.ones(4, 8), f"{key}B.weight": torch.ones(4, 4)}
    save_file(tensors, Path(path, "adapter_model.safetensors"))


def without_b(path: str) -> None:
    key = "base_model.model.layers.0.q_proj.lora_"
    save_file({f"{key}A.weight": torch.ones(4, 8)}, Path(path, "adapter_model.safetensors"))


def of_integers(path: str) -> None:
    key = "base_model.model.layers.0.q_proj.lora_"
    tensors = {f"{key}{each}.weight": torch.ones(4, 4).int() for each in "AB"}
    save_file(tensors, Path(path, "adapter_model.safetensors"))


def without_anything(path: str) -> None:
    save_file({}, Path(path, "adapter_model.safetensors"))


BREAK: list[tuple[Callable[[str], None], str]] = [
    (cut, "adapter_model.safetensors"),
    (remove_weights, "adapter_model.safetensors"),
    (break_config, "Expecting property name"),
    (for_another_layer, "gate_proj, which the base does not have"),
    (without_b, "only one of A and B"),
    (of_integers, "is stored as I32"),
    (without_anything, "has no tensors"),
]


@pytest.mark.parametrize(("damage", "says"), BREAK)
def test_broken_files_are_a_message(
    staged: staging.Staging, form: op.Op, write: Write, damage: Callable[[str], None], says: str
) -> None:
    path = write(1.0)
    damage(path)
    staged.stage(1, path)
    answer = taken(staged, 1)
    assert answer["state"] == "failed"
    assert says in answer["error"]
    staged.stage(1, write(1.5))  # what has failed may be tried again
    assert taken(staged, 1) == THERE
    staged.drop([1])
    freed(form)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"rank": 32}, "rank 32"),
        ({"rank": 32, "says": 8}, r"rank 32, and the engine takes 16"),
        ({"d_in": 9}, "do not fit a layer with 8 inputs"),
    ],
)
def test_shapes_that_do_not_fit(
    staged: staging.Staging, write: Write, shape: dict[str, int], says: str
) -> None:
    staged.stage(1, write(1.0, **shape))
    answer = taken(staged, 1)
    assert answer["state"] == "failed"
    assert says in answer["error"]


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(
    staged: staging.Staging, tmp_path: Path
) -> None:
    staged.stage(1, str(tmp_path / "gone"))
    assert "gone is not there" in taken(staged, 1)["error"]


def test_what_is_dropped_while_it_is_read_never_comes(
    staged: staging.Staging, form: op.Op, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    pause = staging._Reading.pause

    def wait(self: Any) -> None:
        begun.set()
        assert go_on.wait(LONG_S)
        pause(self)

    monkeypatch.setattr(staging._Reading, "pause", wait)
    for each in (1, 2, 3):  # the third waits for a thread
        staged.stage(each, write(each))
    assert begun.wait(LONG_S)
    staged.drop([1, 2, 3])
    staged.stage(4, write(4))
    go_on.set()
    assert taken(staged, 4) == THERE
    assert staged.resident()["host"] == [4]
    assert staged.take(1)["state"] == "failed"
    staged.drop([4])
    freed(form)


def test_threads_leave_the_step_its_threads(staged: staging.Staging, write: Write) -> None:
    before = torch.get_num_threads()
    staged.stage(1, write(1.0))
    assert taken(staged, 1) == THERE
    assert len(staged._threads) == staging.THREADS
    for thread in staged._threads:
        assert thread.daemon
    assert torch.get_num_threads() == before


def test_a_slot_that_cannot_be_filled_is_empty(
    staged: staging.Staging, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged.stage(1, write(1.0))
    taken(staged, 1)

    def no_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(staged._manager), "activate_adapter", no_memory)
        assert staged.slot(1, None) == {"state": "failed", "error": "out of memory"}
    assert staged.resident()["slots"] == [None, None]
    assert staged.resident()["host"] == [1]
    assert staged.slot(1, None) == THERE


def test_what_vllm_evicts_by_itself_is_counted(form: op.Op, write: Write) -> None:
    plugin._stage_off_the_step()
    staged = staging.Staging(worker_of(form))
    for each in (1, 2, 3):
        staged.stage(each, write(each))
        assert taken(staged, each) == THERE
        staged.slot(each, None)
    before = staged.resident()["unasked"]
    staged._manager.activate_adapter(3)
    assert staged.resident()["unasked"] == before + 1
    staged._manager.remove_all_adapters()
    assert staged.resident()["unasked"] == before + 1


def test_any_order_of_asking_keeps_the_books(
    staged: staging.Staging, form: op.Op, write: Write
) -> None:
    """Against a model of what should be where; an adapter says who it is."""
    chosen, before = random.Random(4), staging.Unasked.times
    host: set[int] = set()
    slots: list[int | None] = [None, None]
    layer = staged._manager.modules[NAME]
    for _ in range(300):
        each = chosen.randrange(1, 7)
        match chosen.choice(("stage", "slot", "drop")):
            case "stage" if each not in host:
                drop = [chosen.choice(sorted(host))] if len(host) == 3 else []
                host = host - set(drop) | {each}
                slots = [None if slot in drop else slot for slot in slots]
                staged.drop(drop)
                staged.stage(each, write(each))
                assert taken(staged, each) == THERE
            case "slot" if each in host and each not in slots:
                out = None if None in slots else chosen.choice(slots)
                slots[slots.index(out)] = each
                assert staged.slot(each, out) == THERE
            case "drop":
                host -= {each}
                slots = [None if slot == each else slot for slot in slots]
                staged.drop([each])
        assert staged.resident() == {
            "host": sorted(host), "slots": slots, "reading": [], "unasked": before,
        }  # fmt: skip
        for slot, adapter in enumerate(slots):
            assert said(form, layer, slot)[0] == (adapter or 0) * D_IN * 4
    staged.drop(list(range(7)))
    freed(form)


# --- all workers, from the server ---------------------------------------------------------------


class Workers:
    """As much of an engine as the loader asks: the workers' own methods, called in their order."""

    def __init__(self, *each: Any) -> None:
        self.each, self.dead = each, False

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        await asyncio.sleep(0)
        if self.dead:
            raise EngineDeadError
        return [getattr(worker, method)(*args) for worker in self.each]


class Worker(plugin.WorkerExtension):
    def __init__(self, form: op.Op) -> None:
        self.model_runner = SimpleNamespace(lora_manager=worker_of(form), requests={"a": 1})


@pytest.fixture
def workers(form: op.Op) -> Iterator[Workers]:
    made = Workers(Worker(form), Worker(form))
    yield made
    for each in made.each:
        each.loraplex_drop(list(range(10)))
    freed(form)


def request(adapter: int, path: str) -> LoRARequest:
    return LoRARequest(f"adapter-{adapter}", adapter, path)


async def test_an_adapter_is_there_when_every_worker_has_it(workers: Workers, write: Write) -> None:
    loader = Loader(workers)
    for each in (1, 2, 3):
        await loader.stage(request(each, write(each)))
    await loader.slot(1, None)
    await loader.slot(2, None)
    await loader.slot(3, 1)
    found = await loader.resident()
    assert (found["host"], found["slots"], found["reading"]) == ([1, 2, 3], [3, 2], [])
    await loader.drop([2])
    await loader.stage(request(4, write(4)))
    assert (await loader.resident())["slots"] == [3, None]
    await loader.drop([1, 3, 4])
    assert (await loader.resident())["host"] == []


async def test_what_one_worker_cannot_read_no_worker_keeps(workers: Workers, write: Write) -> None:
    loader, path = Loader(workers), write(1.0)
    workers.each[1].loraplex_stage = lambda lora_id, path: None
    with pytest.raises(LoadFailed, match="not being read"):
        await loader.stage(request(1, path))
    await asyncio.sleep(0.05)
    found = await loader.resident()
    assert (found["host"], found["reading"]) == ([], [])


async def test_a_slot_that_one_worker_cannot_fill_no_worker_fills(
    workers: Workers, write: Write
) -> None:
    loader = Loader(workers)
    await loader.stage(request(1, write(1.0)))
    workers.each[1].loraplex_drop([1])
    with pytest.raises(LoadFailed, match="have not the same adapters"):
        await loader.resident()
    with pytest.raises(LoadFailed, match="not on the host"):
        await loader.slot(1, None)
    for each in workers.each:
        assert each.loraplex_resident()["slots"] == [None, None]


async def test_giving_up_leaves_nothing(
    workers: Workers, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, go_on = Loader(workers), threading.Event()
    pause = staging._Reading.pause

    def wait(self: Any) -> None:
        assert go_on.wait(LONG_S)
        pause(self)

    monkeypatch.setattr(staging._Reading, "pause", wait)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(loader.stage(request(1, write(1.0))), 0.05)
    go_on.set()
    await asyncio.sleep(0.05)
    found = await loader.resident()
    assert (found["host"], found["reading"]) == ([], [])


async def test_a_dead_engine_says_so_itself(workers: Workers, write: Write) -> None:
    loader = Loader(workers)
    workers.dead = True
    for asked in (loader.stage(request(1, write(1.0))), loader.slot(1, None), loader.drop([1])):
        with pytest.raises(EngineDeadError):
            await asked
    await asyncio.sleep(0.01)
