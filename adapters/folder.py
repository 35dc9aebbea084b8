"""The two files of a PEFT folder, the one way they are opened, and what a disk may answer."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adapters.errors import InvalidAdapter, NoSpace, Problem, StoreError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
PICKLE = "adapter_model.bin"  # weights as PEFT saved them before safetensors

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
_CONVERT = (
    'Convert it where you trust it: python -c "import torch, safetensors.torch as s; '
    "s.save_file({{k: v.contiguous() for k, v in "
    "torch.load('{0}', map_location='cpu', weights_only=True).items()}}, "
    "'adapter_model.safetensors')\""
)


def absent(names: Collection[str]) -> list[Problem]:
    """What a folder with these file names lacks to be an adapter; empty if nothing."""
    problems = []
    if CONFIG not in names:
        problems.append(
            Problem(
                "config_missing",
                CONFIG,
                f"There is no {CONFIG}.",
                "Send the folder that PEFT's save_pretrained wrote.",
            )
        )
    if WEIGHTS not in names:
        problems.append(_no_weights(names))
    return problems


def belongs(name: str) -> bool:
    """Whether a file of this name can be a part of an adapter, in whatever form it was saved."""
    return name in FILES or PurePosixPath(name).suffix in _PICKLES


def wanted(names: Collection[str], allow_pickle: bool = False) -> tuple[str, str]:
    """The two files to take of a folder with these file names: the config and the weights.

    With `allow_pickle` the weights may be a pickle where there is nothing better. Raises
    InvalidAdapter if one is missing.
    """
    weights = PICKLE if allow_pickle and PICKLE in names and WEIGHTS not in names else WEIGHTS
    known = {WEIGHTS if name == weights else name for name in names}
    if problems := absent(known):
        raise InvalidAdapter(problems)
    return CONFIG, weights


def _no_weights(names: Collection[str]) -> Problem:
    pickles = sorted(n for n in names if PurePosixPath(n).suffix in _PICKLES)
    adapters = [n for n in pickles if n.startswith("adapter_model")]
    if pickles:
        found = (adapters or pickles)[0]
        return Problem(
            "pickle_refused",
            found,
            f"{found} is a pickle, which can run code when it is read, so it was not read.",
            _CONVERT.format("adapter_model" + PurePosixPath(found).suffix),
        )
    return Problem(
        "weights_missing",
        WEIGHTS,
        f"There is no {WEIGHTS}.",
        "Send the folder that PEFT's save_pretrained wrote.",
    )


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Opens `folder/name` for reading if it is a plain file in that very folder.

    Links are not followed, and a pipe or device is refused instead of waited for.
    Raises InvalidAdapter, or StoreError if the disk fails.
    """
    try:
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        lacking = WEIGHTS if name == PICKLE else name
        raise InvalidAdapter(absent(set(FILES) - {lacking})) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _not_regular(name) from error
        with disk(f"read {name}"):
            raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_regular(name)
    return os.fdopen(handle, "rb")


def _not_regular(name: str) -> InvalidAdapter:
    return InvalidAdapter(
        [
            Problem(
                "not_a_regular_file",
                name,
                f"{name} is a link, folder, pipe or device.",
                "Send the file itself.",
            )
        ]
    )


@contextmanager
def disk(task: str) -> Iterator[None]:
    """Raises StoreError, or NoSpace, for an OSError inside; `task` says what was being done."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"Could not {task}: the disk is full. Free space and try again."
            raise NoSpace(message) from error
        reason = error.strerror or str(error)
        message = f"Could not {task}: {reason}. Check the disk and its permissions."
        raise StoreError(message) from error
