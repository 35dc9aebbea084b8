"""Who a process has started, and whether they are gone."""

import subprocess
import time
from collections.abc import Iterable


def descendants(pid: int) -> set[int]:
    """Process ids of all that `pid` has started, and they in turn."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
    parents = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found = {pid}
    while more := {child for child, parent in parents if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pids: Iterable[int]) -> set[int]:
    """Those of `pids` that run; one that has ended and waits to be reaped does not."""
    found = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] != "Z":
                    found.add(pid)
        except FileNotFoundError:
            pass
    return found


def gone(pids: set[int], within_s: float) -> bool:
    """Whether all of `pids` end within `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)
