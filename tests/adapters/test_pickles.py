from __future__ import annotations

import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters import pickles
from adapters.errors import InvalidAdapter, NoSpace, Problem
from adapters.store import digest

BIN = "adapter_model.bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def put(folder: Path, content: object, **options: object) -> Path:
    if isinstance(content, bytes):
        (folder / BIN).write_bytes(content)
    else:
        torch.save(content, folder / BIN, **options)
    return folder


def refusal(folder: Path) -> Problem:
    before = {p.name: p.lstat().st_size for p in folder.iterdir()}
    with pytest.raises(InvalidAdapter) as refused:
        pickles.convert(folder)
    assert {p.name: p.lstat().st_size for p in folder.iterdir()} == before
    (problem,) = refused.value.problems
    return problem


def repacked(data: bytes, change) -> bytes:
    """The checkpoint `data` with `change(name, content)` in place of each of its records."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return packed.getvalue()


def saved(content: object, **options: object) -> bytes:
    packed = io.BytesIO()
    torch.save(content, packed, **options)
    return packed.getvalue()


def with_pickle(program: bytes) -> bytes:
    """A checkpoint whose pickle is `program`."""
    return repacked(
        saved({"a": torch.ones(2)}), lambda name, old: program if name == "data.pkl" else old
    )


# Setting no items in a dict, many times: small when packed, and read by Python.
ENDLESS = b"\x80\x02}" + b"(u" * 20_000_000 + b"."


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_peft_adapter_has_the_digest_of_its_twin(peft_model, tmp_path):
    model = peft_model(r=4, target_modules="all-linear")
    model.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / BIN).is_file()
    pickles.convert(tmp_path / "old")
    assert not (tmp_path / "old" / BIN).exists()
    assert digest(tmp_path / "old") == digest(tmp_path / "twin")
    assert set(os.listdir(tmp_path / "old")) == set(os.listdir(tmp_path / "twin"))


def test_what_a_checkpoint_may_hold(folder):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": whole.to(torch.bfloat16),
        "transposed": whole.half().t(),
        "parameter": torch.nn.Parameter(whole.clone()),
        "part": torch.randn(100)[10:20],
    }
    pickles.convert(put(folder, OrderedDict(tensors)))
    read = load_file(folder / "adapter_model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert set(os.listdir(folder)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_format_before_zip(folder):
    tensors = {"a": torch.randn(3, 4)}
    pickles.convert(put(folder, tensors, _use_new_zipfile_serialization=False))
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["a"], tensors["a"])


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_code_in_a_pickle_does_not_run(folder, tmp_path, form):
    content = {"a": torch.ones(2), "b": Runs(f"touch {tmp_path}/ran")}
    if form == "bare":
        put(folder, pickle.dumps(content["b"]))
    else:
        put(folder, content, _use_new_zipfile_serialization=form == "zip")
    problem = refusal(folder)
    assert problem.code == "pickle_unreadable"
    assert not (tmp_path / "ran").exists()
    if form == "zip":
        assert "posix.system" in problem.message
    # torch's own advice is to read it without weights_only.
    assert "weights_only" not in problem.message
    assert "weights_only=True" in problem.fix and BIN in problem.fix


good = saved({"a": torch.randn(64, 64)})
shared = torch.ones(4)


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"garbage " * 500, good[: len(good) // 2], good[:-10], b"PK\x03\x04" + b"\0" * 99],
    ids=["empty", "x", "garbage", "half", "no end", "zip header"],
)
def test_what_torch_cannot_read(folder, content):
    assert refusal(put(folder, content)).code == "pickle_unreadable"


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"a": torch.ones(2)}},
        {"a": torch.ones(2), "epoch": 3},
        {0: torch.ones(2)},
        [torch.ones(2)],
        torch.ones(2),
        {"a": torch.ones(3).to_sparse()},
        {"a": torch.empty(3, device="meta")},
        {"a": torch.ones(2, dtype=torch.complex128)},
        {"a": shared, "b": shared[1:]},
        {"\ud800": torch.ones(2)},
    ],
    ids=[
        "nested",
        "number",
        "key",
        "list",
        "tensor",
        "sparse",
        "meta",
        "complex",
        "shared",
        "surrogate",
    ],
)
def test_what_is_no_flat_dict_of_dense_tensors(folder, content):
    assert refusal(put(folder, content)).code == "pickle_contents"


def test_tensors_that_claim_to_be_larger_than_the_file(folder):
    huge = torch.ones(1).expand(2**34)
    assert refusal(put(folder, {"a": huge})).code == "pickle_limits"
    several = {f"t{i}": torch.ones(1).expand(2**24) for i in range(2)}
    assert refusal(put(folder, several)).code == "pickle_limits"


def test_a_zip_that_unpacks_to_more_than_it_may(folder):
    content = saved({"a": torch.zeros(2**28, dtype=torch.uint8)})
    bomb = repacked(content, lambda name, old: old)
    assert len(bomb) < 2**20
    assert refusal(put(folder, bomb)).code == "pickle_limits"


def test_a_storage_whose_size_is_a_lie(folder):
    # The number of elements, as the pickle has it: one byte, 64.
    program = zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(64)}))).read("archive/data.pkl")
    assert program.count(b"K\x40") == 2
    for lie in (b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"J\xff\xff\xff\xff"):
        put(folder, with_pickle(program.replace(b"K\x40", lie)))
        assert refusal(folder).code in ("pickle_limits", "pickle_unreadable")


def test_a_pickle_that_takes_for_ever(folder, monkeypatch):
    monkeypatch.setattr(pickles, "_CPU_S", 1)
    put(folder, with_pickle(ENDLESS))
    assert (folder / BIN).stat().st_size < 2**20
    problem = refusal(folder)
    assert problem.code == "pickle_limits" and "SIGXCPU" in problem.message


def test_only_a_plain_file_is_read(folder, tmp_path):
    put(tmp_path, {"a": torch.ones(2)})
    (folder / BIN).symlink_to(tmp_path / BIN)
    assert refusal(folder).code == "not_a_regular_file"
    (folder / BIN).unlink()
    os.mkfifo(folder / BIN)
    assert refusal(folder).code == "not_a_regular_file"


# A child that is not ours ------------------------------------------------------------------


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Puts a program in the child's place."""

    def replace(program: str) -> None:
        (tmp_path / "child.py").write_text("import json, os, sys, time\n" + program)
        monkeypatch.setattr(pickles, "_CHILD", tmp_path / "child.py")

    return replace


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(found)


def test_a_child_that_does_not_end_is_killed_with_all_it_started(
    folder, child, tmp_path, monkeypatch
):
    monkeypatch.setattr(pickles, "_TIMEOUT_S", 2)
    child(
        "os.fork()\n"
        f"open({str(tmp_path)!r} + f'/pid-{{os.getpid()}}', 'w').close()\n"
        "time.sleep(600)"
    )
    problem = refusal(put(folder, b"x"))
    assert problem.code == "pickle_limits" and "2 s" in problem.message
    pids = [int(p.name[4:]) for p in tmp_path.glob("pid-*")]
    assert len(pids) == 2
    assert wait_for(lambda: not any(map(alive, pids)), 5)


def test_a_child_that_says_too_much_is_not_listened_to(folder, child, monkeypatch):
    monkeypatch.setattr(pickles, "_TIMEOUT_S", 1)
    child("while True: print('x' * 1000)")
    assert refusal(put(folder, b"x")).code == "pickle_limits"


@pytest.mark.parametrize(
    "said",
    [
        "'\\xff\\0'",
        "'[]'",
        "'{}'",
        "'null'",
        "json.dumps({'code': 'made_up', 'reason': 'x', 'errno': 0})",
        "json.dumps({'code': 'pickle_limits', 'reason': [], 'errno': 0})",
        "json.dumps({'code': 'pickle_limits', 'reason': 'x', 'errno': 10**30})",
        "json.dumps({'code': [], 'reason': 'x', 'errno': {}})",
        "'[' * 50000",
    ],
)
def test_a_child_that_says_nonsense(folder, child, said):
    child(f"print({said}); sys.exit(3)")
    assert refusal(put(folder, b"x")).code == "pickle_unreadable"


def test_a_child_that_crashes(folder, child):
    child("import signal; os.kill(os.getpid(), signal.SIGSEGV)")
    problem = refusal(put(folder, b"x"))
    assert problem.code == "pickle_unreadable" and "SIGSEGV" in problem.message


def test_a_child_has_nothing_of_the_servers(folder, child, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with open(os.devnull) as other:
        os.set_inheritable(other.fileno(), True)
        child(
            "seen = [dict(os.environ), sys.path, os.listdir('/proc/self/fd'), os.getsid(0)]\n"
            f"open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps(seen)); sys.exit(3)"
        )
        refusal(put(folder, b"x"))
    environment, path, descriptors, session = json.loads((tmp_path / "seen").read_text())
    assert "secret" not in environment.values()
    # Python adds LC_CTYPE by itself.
    assert environment.keys() - pickles._PASSED_ON - {"LC_CTYPE"} == {
        "HOME",
        "TMPDIR",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
    }
    assert str(tmp_path) not in path and os.getcwd() not in path
    assert len(descriptors) == 4  # stdin, stdout, stderr and the listing itself
    assert session != os.getsid(0)


def test_a_full_disk_is_not_the_adapters_fault(folder, child):
    child(
        f"print(json.dumps({{'code': 'pickle_contents', 'reason': 'x', 'errno': {errno.ENOSPC}}}))"
        "\nsys.exit(3)"
    )
    put(folder, b"x")
    with pytest.raises(NoSpace):
        pickles.convert(folder)
    assert set(os.listdir(folder)) == {BIN, "adapter_config.json"}


# Our child ---------------------------------------------------------------------------------


def test_its_limits_and_that_it_ends_with_the_server(folder):
    put(folder, with_pickle(ENDLESS))
    program = (
        "import sys, pathlib; from adapters import pickles;"
        "pickles.convert(pathlib.Path(sys.argv[1]))"
    )
    server = subprocess.Popen([sys.executable, "-c", program, folder], stderr=subprocess.DEVNULL)
    try:
        tasks = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        assert wait_for(lambda: tasks.read_text().split())
        process = int(tasks.read_text().split()[0])
        limits = Path(f"/proc/{process}/limits")
        assert wait_for(lambda: "Max open files            16  " in limits.read_text())
        rows = {line[:26].strip(): line[26:].split() for line in limits.read_text().split("\n")}
        assert rows["Max open files"][1] == "16"
        assert rows["Max processes"][1] == rows["Max core file size"][1] == "0"
        assert int(rows["Max cpu time"][0]) < 100
        assert int(rows["Max file size"][1]) < 20 * 2**20
        assert int(rows["Max address space"][1]) < 2**40
        status = Path(f"/proc/{process}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        assert wait_for(lambda: not alive(process), 5)
    finally:
        server.kill()
        server.wait()
