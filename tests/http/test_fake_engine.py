"""The fake engine keeps the contract that the real one does (tests/real/test_engine.py)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from server.engine import launch
from tests import fake_engine
from tests.conftest import MakeAdapter
from tests.engine_contract import *  # noqa: F403
from tests.http.conftest import settings


@pytest.fixture(scope="module")
def engine(session_home: Path, base_folder: Path) -> Iterator[Any]:
    engine = fake_engine.start(launch.parse(settings(session_home), base_folder, ["q_proj"]))
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def lora(make_adapter: MakeAdapter) -> LoRARequest:
    return LoRARequest("sha256:0123abcd", 1, str(make_adapter(1)))
