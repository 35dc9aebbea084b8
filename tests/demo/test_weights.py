"""The trained adapters in the project: what the scripts say they are, small, of no machine."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from adapters.demo import TASKS, WEIGHTS

EACH = pytest.mark.parametrize("name", sorted(TASKS))
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def header(name: str) -> dict[str, Any]:
    data = (WEIGHTS / name / "adapter_model.safetensors").read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])  # type: ignore[no-any-return]


@EACH
def test_config(name: str) -> None:
    text = (WEIGHTS / name / "adapter_config.json").read_text()
    config = json.loads(text)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert sorted(config["target_modules"]) == sorted(SEVEN)
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not [v for v in config.values() if isinstance(v, str) and v.startswith(("/", "~"))]


@EACH
def test_tensors(name: str) -> None:
    tensors = {key: value for key, value in header(name).items() if key != "__metadata__"}
    assert len(tensors) == 30 * 7 * 2
    assert {value["dtype"] for value in tensors.values()} == {"BF16"}
    assert {min(value["shape"]) for value in tensors.values()} == {8}
    for module in SEVEN:
        assert sum(f".{module}.lora_" in key for key in tensors) == 30 * 2


@EACH
def test_files_are_few_and_small(name: str) -> None:
    files = {file.name: file.stat().st_size for file in (WEIGHTS / name).iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(files.values()) < 6_000_000


def test_adapters_differ() -> None:
    contents = {(WEIGHTS / name / "adapter_model.safetensors").read_bytes() for name in TASKS}
    assert len(contents) == len(TASKS)
