"""Processes that follow a server end when it does, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

# A server, its child as vLLM starts one (deaf to SIGTERM), and a child of that.
CHILD = (
    "import signal, subprocess, sys, time\n"
    "from server import lifeline\n"
    "lifeline.follow()\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "if len(sys.argv) > 1: subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
    "print('child', flush=True)\n"
    "time.sleep(60)\n"
)
SERVER = (
    "import os, subprocess, sys, time\n"
    "from server import lifeline\n"
    "lifeline.hold()\n"
    "lifeline.follow()\n"
    "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[1]])\n"
    "time.sleep(60)\n"
)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def descendants(pid: int) -> set[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    children = {int(line) for line in found.stdout.split()}
    return children.union(*(descendants(child) for child in children))


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nobody_outlives_the_server(ending: signal.Signals) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, CHILD], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert [server.stdout.readline() for _ in range(2)] == ["child\n", "child\n"]
    children = descendants(server.pid)
    assert len(children) == 2
    server.send_signal(ending)
    server.wait(5)
    deadline = time.monotonic() + 5
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if alive(child)]
    server.stdout.close()
