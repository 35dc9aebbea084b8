"""What vLLM is started with, where it depends on the machine or the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from vllm.platforms import current_platform

from server.config import ConfigError, Settings
from server.engine import launch

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="of the CPU's vLLM")


@pytest.mark.parametrize(
    ("capability", "flags", "stored"),
    [
        ("AVX2", (), "F32"),
        ("AVX2", ("--dtype", "bfloat16"), "BF16"),
        ("AVX2", ("--dtype", "half"), "F16"),
        ("AVX512", (), "BF16"),
        ("AVX512", ("--dtype", "float32"), "F32"),
        ("DEFAULT", (), "BF16"),
    ],
)
def test_a_cpu_without_bf16_computes_in_float32(
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    flags: tuple[str, ...],
    stored: str,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    args = launch.parse(Settings.read([*flags]), base_folder, ["q_proj"])
    assert launch.dtype(args, base_folder) == stored


def test_a_quantized_model_keeps_its_dtype(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    shutil.copytree(base_folder, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    args = launch.parse(Settings.read([]), tmp_path / "base", ["q_proj"])
    assert args.dtype == "auto"


def test_without_a_compiler_nothing_is_compiled(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-compiler")
    assert launch.parse(Settings.read([]), base_folder, ["q_proj"]).enforce_eager
    with pytest.raises(ConfigError, match="--compile: there is no C\\+\\+ compiler"):
        launch.parse(Settings.read(["--compile"]), base_folder, ["q_proj"])
