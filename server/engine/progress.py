"""How far a start has come, told to people as it goes and summed up at its end.

The engine's processes start one another, so the times of the stages travel in the environment.
"""

import os
import time
from itertools import pairwise

from server.logs import say

STAGES = "_LORAPLEX_STAGES"


def begin() -> None:
    """The start begins: stages are counted from now."""
    os.environ[STAGES] = f"begin={time.time():.3f}"


def passed(stage: str, next_: str = "") -> None:
    """`stage` is done, in this process; says that `next_` comes now. Nothing without a `begin`."""
    if STAGES not in os.environ:
        return
    os.environ[STAGES] += f";{stage}={time.time():.3f}"
    if next_:
        say(next_)


def so_far() -> str:
    """The stages of this process and those that led to it, for `summary` in another."""
    return os.environ.get(STAGES, "")


def summary(stages: str, last: str) -> str:
    """Seconds of each stage in `stages`, then of `last`, which ends now: `imports 6.1, …`."""
    marks = [(name, float(at)) for name, at in (each.split("=") for each in stages.split(";"))]
    marks.append((last, time.time()))
    return ", ".join(f"{name} {at - before:.1f}" for (_, before), (name, at) in pairwise(marks))
