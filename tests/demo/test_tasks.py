"""The demo tasks: nothing shared between splits, right replies pass, wrong ones fail, and the
weights are what the documents say.
"""

import json
import struct
import time
from pathlib import Path

import pytest

from adapters.demo import TASKS, WEIGHTS
from adapters.demo.task import SPLITS, Item, TooFewItems

N = 80


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    return {name: task.items("test", N, 0) for name, task in TASKS.items()}


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_nothing(name: str) -> None:
    drawn = {
        split: TASKS[name].items(split, 600 if split == "train" else 200, 0) for split in SPLITS
    }
    for one in SPLITS:
        prompts = {item.prompt for item in drawn[one]}
        assert len(prompts) == len(drawn[one])
        for other in SPLITS:
            if other != one:
                assert not prompts & {item.prompt for item in drawn[other]}


def test_topics_of_the_test_were_never_trained_on() -> None:
    topics = {
        split: {item.tests[0] for item in TASKS["poetry"].items(split, 600, 1)} for split in SPLITS
    }
    assert not topics["test"] & (topics["train"] | topics["validation"])


@pytest.mark.parametrize("name", TASKS)
def test_equal_arguments_give_equal_items(name: str) -> None:
    assert TASKS[name].items("test", 20, 3) == TASKS[name].items("test", 20, 3)
    assert TASKS[name].items("test", 20, 3) != TASKS[name].items("test", 20, 4)


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_passes_its_own_check_fenced_or_not(
    items: dict[str, list[Item]], name: str
) -> None:
    for item in items[name][:40]:
        assert TASKS[name].check(item, item.answer), item
    fenced = items[name][0]
    assert TASKS[name].check(fenced, f"```\n{fenced.answer}\n```")


@pytest.mark.parametrize("name", TASKS)
def test_another_items_answer_rarely_passes(items: dict[str, list[Item]], name: str) -> None:
    shifted = zip(items[name], items[name][1:], strict=False)
    passed = sum(TASKS[name].check(item, other.answer) for item, other in shifted)
    assert passed <= N // 20


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("reply", ["", "I am sorry.", "```\n```", "\0", "SELECT 1", "pass"])
def test_no_answer_fails(items: dict[str, list[Item]], name: str, reply: str) -> None:
    assert not any(TASKS[name].check(item, reply) for item in items[name][:5])


@pytest.mark.parametrize(
    "reply",
    [
        "DROP TABLE {0}",
        "DELETE FROM {0}",
        "SELECT * FROM nothing",
        "ATTACH DATABASE '/tmp/x.db' AS x",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    ],
)
def test_sql_that_writes_or_never_ends_fails(items: dict[str, list[Item]], reply: str) -> None:
    item = items["sql"][0]
    table = item.prompt.partition("CREATE TABLE ")[2].split()[0]
    started = time.monotonic()
    assert not TASKS["sql"].check(item, reply.format(table))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "return [0] * 10**10",
        "import os\n    while True: os.fork()",
        "open('x', 'wb').write(bytes(10**9))",
        "import os, signal\n    os.kill(os.getppid(), signal.SIGTERM)",
        "raise SystemExit(0)",
        "import os\n    os._exit(0)",
        "return None",
    ],
)
def test_code_that_misbehaves_fails_and_harms_nobody(
    items: dict[str, list[Item]], body: str, tmp_path: Path
) -> None:
    item = items["code"][0]
    head = item.prompt[item.prompt.index("def ") :].splitlines()[0]
    assert not TASKS["code"].check(item, f"{head}\n    {body}\n")


def test_poems_that_break_the_form_fail(items: dict[str, list[Item]]) -> None:
    item = items["poetry"][0]
    topic, check = item.tests[0], TASKS["poetry"].check
    good = item.answer.splitlines()
    assert check(item, "\n".join(good))
    assert not check(item, "\n".join(good[:3]))
    assert not check(item, "\n".join([*good, good[0]]))
    assert not check(item, "\n".join([good[0], good[2], good[1], good[3]]))
    assert not check(item, "\n".join([good[0], good[0], good[2], good[3]]))
    assert not check(item, "\n".join(good).replace(topic, "thing"))
    assert not check(item, "\n".join([good[0] + " and so on and on and on", *good[1:]]))
    assert not check(item, " ".join(good))


def test_too_many_items_are_said_to_be_too_many() -> None:
    with pytest.raises(TooFewItems, match="only"):
        TASKS["poetry"].items("test", 10**6, 0)


@pytest.mark.parametrize("name", TASKS)
def test_weights_are_what_the_guide_advises_and_small(name: str) -> None:
    config = json.loads((WEIGHTS / name / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert len(config["target_modules"]) == 7
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    data = (WEIGHTS / name / "adapter_model.safetensors").read_bytes()
    assert len(data) < 6_000_000
    (size,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + size])
    tensors.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    assert len(tensors) == 30 * 7 * 2
