"""The program `adapters.pickles` runs: a torch checkpoint on stdin, safetensors in a file.

It is run by its path and in isolation, so it imports nothing of this project. Limits are set
after torch is there, since what torch takes is not the checkpoint's doing (0.6 GB of address
space on CPU, many more with CUDA), and before the first byte of the checkpoint is read.

If it fails, the last line it printed is JSON: `code`, `reason`, and `errno`, which is not 0 where
the disk was at fault.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import resource
import signal
import sys
import time
from typing import Any, NoReturn

FAILED = 3

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_MAX_FILES = 16
_MAX_HEADER = 2**24  # as in adapters.weights


def main(parent: int, output: str, memory: int, cpu_s: int) -> None:
    """Converts; `memory` is in bytes beyond what torch takes, `cpu_s` beyond what that took."""
    _tie(parent)
    import safetensors.torch
    import torch

    torch.set_num_threads(1)
    size = os.fstat(sys.stdin.fileno()).st_size
    _limit(memory, cpu_s, size + _MAX_HEADER)
    try:
        loaded = torch.load(sys.stdin.buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        _fail("pickle_unreadable", error)
    try:
        tensors = _tensors(loaded)
        del loaded
        safetensors.torch.save_file(tensors, output, metadata={"format": "pt"})
    except Exception as error:
        _fail("pickle_contents", error)


def _tie(parent: int) -> None:
    """Ends this process with the thread that waits for it; privileges cannot grow any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before it could be tied to
        os._exit(FAILED)


def _limit(memory: int, cpu_s: int, file: int) -> None:
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: taken + memory,
        resource.RLIMIT_FSIZE: file,
        resource.RLIMIT_NOFILE: _MAX_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    # Where soft and hard limit are one, the kernel sends SIGKILL, which does not say why.
    cpu_s += math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (most, most))


def _tensors(loaded: Any) -> dict[str, Any]:
    """The checkpoint as safetensors can save it; raises ValueError if it is anything else."""
    if not isinstance(loaded, dict):
        raise ValueError(f"it is a {type(loaded).__name__}, not a dict")
    for name, value in loaded.items():
        if not isinstance(name, str) or not _is_dense(value):
            raise ValueError(f"{name!a:.80} is not a dense tensor of real numbers")
    return {name: value.detach().contiguous() for name, value in loaded.items()}


def _is_dense(value: Any) -> bool:
    import torch

    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
        and not value.is_quantized
        and not value.is_complex()
    )


def _fail(code: str, error: Exception) -> NoReturn:
    """Says what `error` means, `code` if nothing else, and ends the process."""
    number = _errno(error)
    if number == errno.EFBIG or _is_memory(error):
        code, reason, number = "pickle_limits", "it takes far more to hold than its own size", 0
    else:
        reason = _reason(error)
    print(json.dumps({"code": code, "reason": reason, "errno": number}), flush=True)
    # Not by way of destructors, which may need the memory that has run out.
    os._exit(FAILED)


def _is_memory(error: Exception) -> bool:
    # torch has no class for it.
    return isinstance(error, MemoryError) or bool(
        re.search(r"can't allocate|bad_alloc", str(error))
    )


def _errno(error: Exception) -> int:
    """What the system said while writing, or 0; safetensors has it in its text only."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


def _reason(error: Exception) -> str:
    # torch wraps what it found into advice to load the file without weights_only.
    found = error.__context__ if "weights_only" in str(error) and error.__context__ else error
    text = str(found).strip() or type(found).__name__
    return re.split(r"\.\s|\n", text, maxsplit=1)[0].rstrip(".")[:300]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
