"""Adapters on their way into a worker, off its steps: a thread reads, checks and packs them.

Runs in each worker process. The server says what goes where (`plugin.WorkerExtension`); a step
finds everything in its place. What vLLM would do by itself is counted in `Unasked`: evict the least
recently used, or read a file in a step.
"""

import copy
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from adapters import weights
from adapters.errors import InvalidAdapter
from adapters.folder import WEIGHTS

THREADS = 2
BURST_S = 0.0005  # worked without a break; a step that needs the interpreter waits no longer
REST = 3  # times as long as a burst, slept after it while requests run
BLOCK = 2**20  # bytes read at once
TENSORS = 16  # handed to vLLM at once; even, as modules have two
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Tensors = list[torch.Tensor | None]


class Unasked:
    """How often vLLM did by itself in this process what the server decides."""

    times = 0


class _Dropped(Exception):
    """What is being read is no longer wanted."""


class _Reading:
    """One adapter that is read; `lora` is there when that has ended well, `error` when not."""

    def __init__(self, path: str, busy: Callable[[], bool]) -> None:
        self.path = path
        self._busy = busy
        self.lora: LoRAModel | None = None
        self.error: str | None = None
        self.dropped = False
        self._began = time.thread_time()

    def begin(self) -> None:
        self._began = time.thread_time()
        self.pause()

    def pause(self) -> None:
        """Called often by the thread: leaves core and interpreter to the steps most of the time.

        Raises:
            _Dropped: nobody waits for this adapter.
        """
        if self.dropped:
            raise _Dropped
        worked = time.thread_time() - self._began
        if worked > BURST_S:
            time.sleep(REST * worked if self._busy() else 0)
            self._began = time.thread_time()


class Staging:
    """The adapters of one worker. All but the threads runs between its steps, and returns at once.

    `worker` is vLLM's LRUCacheWorkerLoRAManager; `busy` says whether requests are running.
    """

    def __init__(self, worker: Any, busy: Callable[[], bool] = lambda: True) -> None:
        self._worker = worker
        self._busy = busy
        self._manager = worker._adapter_manager
        self._readings: dict[int, _Reading] = {}
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def stage(self, adapter: int, path: str) -> None:
        """Has `path` read, unless the adapter is there or being read."""
        reading = self._readings.get(adapter)
        if adapter in self._host or (reading is not None and reading.error is None):
            return
        self._begin()
        self._readings[adapter] = reading = _Reading(path, self._busy)
        self._work.put(lambda: self._read(adapter, reading))

    def take(self, adapter: int) -> dict[str, str]:
        """Puts what has been read into the host cache."""
        if adapter in self._host:
            return _answer("there")
        reading = self._readings.get(adapter)
        if reading is None:
            return _answer("failed", "it is not being read")
        if reading.error is not None:
            return _answer("failed", reading.error)
        if reading.lora is None:
            return _answer("reading")
        if len(self._host) >= self._manager.capacity:
            return _answer("failed", "there is no place for it on the host")
        self._host[adapter] = reading.lora
        del self._readings[adapter]
        return _answer("there")

    def slot(self, adapter: int | None, out: int | None) -> dict[str, str]:
        """Takes `out` out of its slot, then puts `adapter` into a free one."""
        if out is not None and out != adapter:
            self._manager.deactivate_adapter(out)
        if adapter is None or adapter in self._manager._active_adapters:
            return _answer("there")
        if adapter not in self._host:
            return _answer("failed", "it is not on the host")
        if None not in self._manager.lora_index_to_id:
            return _answer("failed", "there is no free slot")
        try:
            with gpu_sync_allowed():
                self._manager.activate_adapter(adapter)
        except Exception as error:
            self._manager.deactivate_adapter(adapter)
            return _answer("failed", _message(error))
        return _answer("there")

    def drop(self, adapters: list[int]) -> None:
        """Takes adapters out of slot and host cache, and gives up reading them."""
        for adapter in adapters:
            reading = self._readings.pop(adapter, None)
            last = self._host.get(adapter)
            if reading is not None:
                reading.dropped, last = True, reading.lora
            self._manager.remove_adapter(adapter)
            if last is not None:
                self._begin()
                self._work.put(_Last(last).forget)

    def resident(self) -> dict[str, Any]:
        """What is where: host, reading: ids, ascending; slots: id or None of each; unasked."""
        return {
            "host": sorted(self._host.cache),
            "slots": list(self._manager.lora_index_to_id),
            "reading": sorted(self._readings),
            "unasked": Unasked.times,
        }

    @property
    def _host(self) -> Any:
        return self._manager._registered_adapters

    # --- in the threads -----------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._threads:
            cores = _cores()
            self._threads = [
                threading.Thread(target=self._run, args=(cores,), name=f"staging-{i}", daemon=True)
                for i in range(THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def _run(self, cores: set[int]) -> None:
        # A new thread has its parent's one core, which is a step's.
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(1)
        if self._manager.device.type == "cuda":
            torch.cuda.set_device(self._manager.device)
        while True:
            self._work.get()()

    def _read(self, adapter: int, reading: _Reading) -> None:
        try:
            reading.begin()
            reading.lora = self._load(adapter, reading)
        except _Dropped:
            pass
        except Exception as error:
            reading.error = _message(error)

    def _load(self, adapter: int, reading: _Reading) -> LoRAModel:
        if not os.path.isdir(reading.path):  # vLLM would look for it on the hub
            raise FileNotFoundError(f"{reading.path} is not there")
        reader = copy.copy(self._worker)
        reader._lora_model_cls = _File(reading.pause)
        request = LoRARequest(str(adapter), adapter, reading.path)
        lora = WorkerLoRAManager._load_adapter(reader, request)
        reading.pause()
        self._manager._create_merged_loras_inplace(lora)
        reading.pause()
        if hasattr(self._manager, "pack"):
            self._manager.pack(lora, reading.pause)
        else:
            self._check(lora, reading.pause)
        return lora

    def _check(self, lora: LoRAModel, pause: Callable[[], None]) -> None:
        for name, module in self._manager.modules.items():
            found = self._manager._get_lora_layer_weights(lora, name)
            if isinstance(module, BaseLinearLayerWithLoRA) and found is not None:
                slices(name, module, found)
                pause()


@dataclass
class _Last:
    """The last hold on an adapter: what frees its memory is a thread, and not a step."""

    lora: LoRAModel | None

    def forget(self) -> None:
        self.lora = None


class _File:
    """Takes the place of vLLM's LoRAModel where an adapter is read: the same, with pauses.

    The file is read and not mapped: one that is cut short meanwhile is an error, and not the end
    of the process.
    """

    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause

    def from_local_checkpoint(
        self,
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: Any,
        *,
        moe_ep_spec: Any = None,
        **options: Any,
    ) -> LoRAModel:
        """As LoRAModel has it."""
        if moe_ep_spec is not None:
            return LoRAModel.from_local_checkpoint(
                lora_dir, expected_lora_modules, peft_helper, moe_ep_spec=moe_ep_spec, **options
            )
        tensors = self._tensors(Path(lora_dir))
        if not tensors:
            raise ValueError(f"{lora_dir} has no tensors")
        names = sorted(tensors)
        parts = []
        for first in range(0, len(names), TENSORS):
            part = {name: tensors.pop(name) for name in names[first : first + TENSORS]}
            self._expect(expected_lora_modules, part, options.get("weights_mapper"))
            parts.append(
                LoRAModel.from_lora_tensors(tensors=part, peft_helper=peft_helper, **options)
            )
            self._pause()
        whole, *rest = parts
        for part in rest:
            whole.loras.update(part.loras)
        for name, found in whole.loras.items():
            if found.lora_a is None or found.lora_b is None:
                raise ValueError(f"{name} has only one of A and B")
        return whole

    def _expect(self, modules: set[str], tensors: dict[str, Any], mapper: Any) -> None:
        for tensor in tensors:
            name, _ = parse_fine_tuned_lora_name(tensor, mapper)
            if name.rpartition(".")[2] not in modules:
                raise ValueError(f"it is for {name}, which the base does not have")

    def _tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        found = weights.read(folder)
        self._pause()
        with open(folder / WEIGHTS, "rb", buffering=0) as file:
            data = self._bytes(file, found.bytes)
        tensors = {}
        for name, each in found.tensors.items():
            if each.dtype not in DTYPES:
                raise ValueError(f"{name} is stored as {each.dtype}")
            numbers = data[each.begin : each.end].view(DTYPES[each.dtype])
            tensors[name] = numbers.view(each.shape)
            self._pause()
        return tensors

    def _bytes(self, file: Any, size: int) -> torch.Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        view = memoryview(data.numpy())
        done = 0
        while done < size:
            read = file.readinto(view[done : done + BLOCK])
            if not read:
                raise ValueError(f"{WEIGHTS} ends after {done} of {size} bytes")
            done += read
            self._pause()
        return data


def slices(name: str, module: Any, found: Any) -> tuple[Tensors, Tensors]:
    """A [rank, d_in] and B [width, rank] of every slice of a linear layer, None where it has none.

    They are this worker's share of them, as the layer's `set_lora` would copy it, and views where
    that is possible.

    Raises:
        ValueError: they do not fit the layer.
    """
    a, b = found.lora_a, found.lora_b
    several = hasattr(module, "expand_packed_lora")
    if several and isinstance(b, torch.Tensor):
        a, b = [a] * module.n_slices, list(b.split(module.base_layer.output_sizes))
    if several and len(b) != module.n_slices:
        a, b = module.expand_packed_lora(a, b)
    if module.tp_size > 1:
        a, b = module.slice_lora_a(a), module.slice_lora_b(b)
    if isinstance(a, torch.Tensor):
        a, b = [a], [b]
    for i in range(module.n_slices):
        if a[i] is not None:
            _fits(name, a[i], b[i], module.lora_a_stacked[i].shape, module.lora_b_stacked[i].shape)
    return a, b


def _fits(
    name: str, a: torch.Tensor, b: torch.Tensor, room_a: torch.Size, room_b: torch.Size
) -> None:
    rank, d_in = a.shape
    if b.shape != (room_b[-2], rank) or d_in != room_a[-1]:
        raise ValueError(
            f"{name}: A {list(a.shape)} and B {list(b.shape)} do not fit a layer with {room_a[-1]} "
            f"inputs and {room_b[-2]} outputs"
        )
    if rank > room_b[-1]:
        raise ValueError(f"{name} has rank {rank}, and the engine takes {room_b[-1]} at most")


def _cores() -> set[int]:
    """Cores that any thread of this process may use; its first has only one, by vLLM's choice."""
    each = [int(thread) for thread in os.listdir("/proc/self/task")]
    return set().union(*map(os.sched_getaffinity, each))


def _answer(state: str, error: str = "") -> dict[str, str]:
    return {"state": state, "error": error}


def _message(error: BaseException) -> str:
    if isinstance(error, InvalidAdapter):
        return "; ".join(problem.message for problem in error.problems)
    return str(error) or type(error).__name__
