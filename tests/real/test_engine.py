"""The real engine keeps the contract that the fake one does (tests/http/test_fake_engine.py)."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from vllm.lora.request import LoRARequest

from server import lifeline
from server.config import Settings
from server.engine import launch, plugin
from tests.conftest import SEVEN, MakeAdapter
from tests.engine_contract import *  # noqa: F403


@pytest_asyncio.fixture(scope="module")
async def engine(session_home: Path, base_folder: Path) -> AsyncIterator[Any]:
    lifeline.hold()
    settings = Settings.read(["--home", str(session_home), "--max-loras", "2"])
    args = launch.parse(settings, base_folder, list(SEVEN))
    engine = await asyncio.to_thread(launch.start, args)
    await launch.verify(engine)
    # What adapters are stored in for the engine is what it computes with.
    stored, computed = launch.dtype(args, base_folder), engine.model_config.dtype
    assert (stored, computed) in {("BF16", torch.bfloat16), ("F32", torch.float32)}
    assert (stored == "F32") == (torch.backends.cpu.get_cpu_capability() == "AVX2")
    yield engine
    engine.shutdown(timeout=1)
    del os.environ[lifeline.SERVER]  # other tests' engines are in no server


@pytest.fixture(scope="module")
def lora(make_adapter: MakeAdapter) -> LoRARequest:
    return LoRARequest("sha256:0123abcd", 1, str(make_adapter(1)))


async def test_verify_tells_another_op(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "OP_WRAPPER", "somebody.else")
    with pytest.raises(RuntimeError, match=r"OpPunicaWrapper, not somebody\.else"):
        await launch.verify(engine)
