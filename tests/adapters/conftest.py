"""Adapters made by hand for a base of four linear layers, and real ones made with PEFT."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.base import BaseSpec
from adapters.database import Database
from adapters.registry import Registry
from adapters.store import Store

LINEARS = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.1.self_attn.q_proj": (16, 16),
    "model.layers.1.self_attn.v_proj": (8, 16),
    "lm_head": (64, 16),
}
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I32": "<i4"}


def bfloat16(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2")


@dataclass
class Made:
    """A PEFT folder as data, to be bent before it is written.

    `tensors` maps names to (dtype, numbers); bfloat16 is given as its bits.
    """

    config: dict[str, Any]
    tensors: dict[str, tuple[str, np.ndarray]]
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})

    def header(self, order: Sequence[str] | None = None) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        if self.metadata is not None:
            entries["__metadata__"] = self.metadata
        end = 0
        for name in order or list(self.tensors):
            dtype, numbers = self.tensors[name]
            begin, end = end, end + numbers.nbytes
            entries[name] = {
                "dtype": dtype,
                "shape": list(numbers.shape),
                "data_offsets": [begin, end],
            }
        return entries

    def weights(self, order: Sequence[str] | None = None) -> bytes:
        text = json.dumps(self.header(order)).encode()
        data = b"".join(self.tensors[n][1].tobytes() for n in order or list(self.tensors))
        return struct.pack("<Q", len(text)) + text + data

    def write(self, folder: Path, order: Sequence[str] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        (folder / "adapter_model.safetensors").write_bytes(self.weights(order))
        return folder


def make(
    rank: int = 4,
    seed: int = 0,
    dtype: str = "F32",
    modules: Mapping[str, tuple[int, int]] | None = None,
    **config: Any,
) -> Made:
    rng = np.random.default_rng(seed)
    tensors = {}
    chosen = modules or {m: s for m, s in LINEARS.items() if m != "lm_head"}
    for module, (d_out, d_in) in chosen.items():
        for part, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            numbers = rng.standard_normal(shape).astype("<f4")
            bits = bfloat16(numbers) if dtype == "BF16" else numbers.astype(NUMPY[dtype])
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = (dtype, bits)
    written = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/Tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        **config,
    }
    return Made(written, tensors)


@pytest.fixture(name="make")
def _make() -> Callable[..., Made]:
    return make


@pytest.fixture
def base() -> BaseSpec:
    return BaseSpec("tiny", LINEARS, 4096, 8192)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Database.of(tmp_path))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a llama of two layers."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def peft_model(tiny_llama: Path) -> Callable[..., Any]:
    """Makes a PEFT model of the tiny llama, with B filled in, from LoraConfig's arguments."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(**arguments: Any) -> Any:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama))
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **arguments))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        return adapted

    return build
