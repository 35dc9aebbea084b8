"""Exact with any number of slots, adapters of every shape, chunked prefill and prefix cache."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeAdapter
from tests.real.every_max_loras import MOST, SLOTS
from tests.real.reference import Reference, Reply, gap

# Ranks, and which linears an adapter is for: parts of fused layers, a part of the model's layers,
# a rank of its own for some.
KINDS: tuple[dict[str, Any], ...] = (
    {"rank": 8},
    {"rank": 64},
    {"rank": 16, "targets": ("q_proj", "down_proj")},
    {"rank": 8, "targets": ("v_proj", "up_proj"), "layers_to_transform": list(range(0, 30, 2))},
    {"rank": 16, "rank_pattern": {"k_proj": 4, "gate_proj": 32}},
)

# A process for each: most of an engine's start keeps no more than one busy.
CORES = sorted(os.sched_getaffinity(0))[: len(SLOTS)]


@pytest.mark.timeout(900)
def test_every_row_is_what_peft_says(base_folder: Path, make_adapter: MakeAdapter) -> None:
    kinds = [KINDS[i % len(KINDS)] for i in range(MOST + 1)]
    folders = [make_adapter(100 + i, std=0.01, **kind) for i, kind in enumerate(kinds)]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda core: replies(core, base_folder, folders), range(len(CORES)))
        answers = list(itertools.chain(*found))
    assert {answer["slots"] for answer in answers} == set(SLOTS)

    reference = Reference(base_folder, {str(i): folder for i, folder in enumerate(folders)})
    worst = 0.0
    for (name, prompt, tokens), same in itertools.groupby(sorted(answers, key=asked), asked):
        want = reference.logprobs(name, list(prompt), tokens)
        for answer in same:
            off = gap(Reply.read(answer), want)
            assert off < 1, (answer["slots"], name, off)
            worst = max(worst, off)
    print(f"the worst row uses {worst:.2f} of the tolerance")


def asked(answer: dict[str, Any]) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """What the reference is asked: who said which tokens, after which prompt."""
    name = "base" if answer["adapter"] is None else str(answer["adapter"])
    return name, tuple(answer["prompt"]), tuple(answer["tokens"])


def replies(core: int, base: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """What a process on one of the cores says, for its part of the numbers of slots."""
    os.sched_setaffinity(0, {CORES[core]})  # this thread's, which its child has too
    slots = json.dumps(SLOTS[core :: len(CORES)])
    command = [sys.executable, "-m", "tests.real.every_max_loras", slots, str(base)]
    done = subprocess.run(
        [*command, *map(str, folders)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "op: avx" in done.stdout or "op: generic" in done.stdout
    lines = (line for line in done.stdout.splitlines() if line.startswith("[{"))
    return [answer for line in lines for answer in json.loads(line)]
