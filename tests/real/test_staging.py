"""Adapters staged off the engine's step, in a real engine: exact, and its books always right."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from adapters import canonical, peft
from adapters.base import BaseSpec
from tests.conftest import THOROUGH, MakeAdapter
from tests.real.reference import Reference, Reply, gap
from tests.real.staging import PROMPT

KINDS: tuple[dict[str, Any], ...] = (
    {"rank": 8},
    {"rank": 64},
    {"rank": 16, "targets": ("q_proj", "down_proj")},
    {"rank": 16, "rank_pattern": {"k_proj": 4, "gate_proj": 32}},
    {"rank": 8, "targets": ("v_proj", "up_proj")},
)
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.timeout(900)
# The base has 9 heads, with 3 pairs of K and V.
@pytest.mark.parametrize("workers", [1, 3] if THOROUGH else [3])
def test_staged_in_any_order_every_adapter_is_exact(
    base_folder: Path, make_adapter: MakeAdapter, tmp_path: Path, workers: int
) -> None:
    folders = [make_adapter(300 + i, std=0.01, **kind) for i, kind in enumerate(KINDS)]
    spec = BaseSpec.read(base_folder, "base")
    forms = [form(folder, spec, tmp_path / str(i)) for i, folder in enumerate(folders)]
    broken = tmp_path / "broken"
    break_each(folders[0], spec, broken)
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "tests.real.staging", str(out), str(base_folder)]
    done = subprocess.run(
        [*command, str(workers), str(broken), *map(str, forms)],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(out.read_text())

    messages = said["messages"]
    assert "before it was staged" in messages.pop("unasked")
    assert sorted(messages) == ["config", "cut", "empty", "high", "wide"], messages
    assert "and has 100000" in messages["cut"]
    assert "rank" in messages["high"]
    assert "do not fit a layer" in messages["wide"]

    reference = Reference(base_folder, {str(i): folder for i, folder in enumerate(folders, 1)})
    assert len(said["replies"]) == len(folders) + 1
    for name, answer in said["replies"].items():
        reply = Reply.read(answer)
        found = gap(reply, reference.logprobs(name, PROMPT, reply.tokens))
        assert found < 1, (name, found)


def form(folder: Path, base: BaseSpec, into: Path) -> Path:
    """The adapter in `folder` as the engine loads it."""
    into.mkdir(parents=True)
    assert canonical.write(folder, peft.read(folder), base, "BF16", into) == []
    return into


def break_each(folder: Path, base: BaseSpec, into: Path) -> None:
    """Forms of which each is wrong in its own way, by name."""
    for name in ("cut", "config", "empty", "high", "wide"):
        form(folder, base, into / name)
    os.truncate(into / "cut" / WEIGHTS, 100_000)
    (into / "config" / "adapter_config.json").unlink()
    (into / "empty" / WEIGHTS).write_bytes(b"")
    config = into / "high" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 65}))
    tensors = load_file(into / "wide" / WEIGHTS)
    name = next(each for each in tensors if "lora_A" in each)
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, into / "wide" / WEIGHTS)
