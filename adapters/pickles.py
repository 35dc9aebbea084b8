"""Weights as PEFT saved them before safetensors, converted in a process with nothing to lose.

torch's `weights_only` reads no code, but it is a parser of strangers' bytes written in C++ and
Python, and such have had holes. So it runs apart (`adapters.pickles_child`): without the server's
environment, with limits on all it can take, and not a moment longer than it is waited for.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from adapters.errors import InvalidAdapter, Problem
from adapters.folder import CONFIG, PICKLE, WEIGHTS, absent, disk, open_regular

_CHILD = Path(__file__).with_name("pickles_child.py")
# From start to end. What a loop takes ends at _CPU_S already; this is for slow disks.
_TIMEOUT_S = 180.0
# Reading and writing a gigabyte takes about two.
_CPU_S = 60
# The tensors, and a second time those that are not contiguous; torch reads in little more.
_MEMORY_PER_BYTE = 2
_MEMORY = 128 * 2**20
# More than a full pipe: nobody reads while the child runs, so it can say no more than this.
_MAX_OUTPUT = 2**20
# A loader may need this to find torch's libraries. Nothing else of the server's is passed on.
_PASSED_ON = ("LD_LIBRARY_PATH",)
_CODES = ("pickle_unreadable", "pickle_contents", "pickle_limits")
_OUT_OF_BOUNDS = (signal.SIGXCPU, signal.SIGABRT, signal.SIGKILL)


def convert(folder: Path) -> None:
    """Makes `adapter_model.safetensors` of the `adapter_model.bin` in `folder`, and removes that.

    Blocks for some seconds, most of them torch's import. Raises InvalidAdapter if the file is no
    flat dict of dense tensors or takes too much to read (codes `pickle_unreadable`,
    `pickle_contents`, `pickle_limits`), and StoreError if the disk fails. The folder is then as
    it was.
    """
    with open_regular(folder, PICKLE) as pickle, disk(f"convert {PICKLE}"):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as work:
            output = Path(work, WEIGHTS)
            _run(pickle, output)
            output.replace(folder / WEIGHTS)
        (folder / PICKLE).unlink()


def _run(pickle: BinaryIO, output: Path) -> None:
    memory = _MEMORY + _MEMORY_PER_BYTE * os.fstat(pickle.fileno()).st_size
    arguments = [_CHILD, os.getpid(), output, memory, _CPU_S]
    child = subprocess.Popen(  # noqa: S603 - our own program; nothing in it comes from the upload
        [sys.executable, "-I", *map(str, arguments)],
        stdin=pickle,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=output.parent,
        env=_environment(output.parent),
        start_new_session=True,
    )
    with child:
        in_time = _finish(child, _TIMEOUT_S)
        said = _said(child)
    if not in_time:
        raise _refusal("pickle_limits", f"reading it took more than {_TIMEOUT_S:.0f} s")
    _judge(child.returncode, said)


def _environment(work: Path) -> dict[str, str]:
    kept = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    # Threads and GPUs would take memory and processes it may not have.
    own = {"HOME": str(work), "TMPDIR": str(work), "OMP_NUM_THREADS": "1"}
    return {**kept, **own, "CUDA_VISIBLE_DEVICES": ""}


def _finish(child: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Waits for `child`; whether it ended by itself. All it started is gone afterwards, too."""
    handle = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        # Not reaped yet, so the number is still the child's group and nobody else's.
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        os.close(handle)


def _said(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None  # noqa: S101 - for mypy
    os.set_blocking(child.stdout.fileno(), False)
    try:
        return os.read(child.stdout.fileno(), _MAX_OUTPUT).decode(errors="replace")
    except BlockingIOError:
        return ""


def _judge(status: int, said: str) -> None:
    """Raises what the child's end means."""
    if status == 0:
        return
    if status < 0:
        ended = signal.Signals(-status)
        code = "pickle_limits" if ended in _OUT_OF_BOUNDS else "pickle_unreadable"
        raise _refusal(code, f"the process that read it was ended by {ended.name}")
    code, reason, number = _verdict(said)
    if number:
        raise OSError(number, os.strerror(number))
    raise _refusal(code, reason)


def _verdict(said: str) -> tuple[str, str, int]:
    """Code, reason and errno of the child's last line, which is not to be trusted either."""
    last = said.strip().rpartition("\n")[2]
    try:
        verdict = json.loads(last)
        code, reason, number = verdict["code"], verdict["reason"], verdict["errno"]
        known = code in _CODES and (number == 0 or number in errno.errorcode)
        if known and isinstance(reason, str):
            return code, reason, number
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    # It came to nothing before it read the file: torch is missing or broken here.
    return "pickle_unreadable", f"torch could not be started ({last:.200})", 0


def _refusal(code: str, reason: str) -> InvalidAdapter:
    message = f"{PICKLE} was not converted: {reason}."
    fix = absent({CONFIG, PICKLE})[0].fix  # how to convert it oneself
    return InvalidAdapter([Problem(code, PICKLE, message, fix)])
