"""Processes that follow a server end when it does, however it ends."""

import signal
import subprocess
import sys

import pytest

from tests.processes import alive, descendants, gone

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
    "import os, signal, subprocess, sys, time\n"
    # Whoever starts the tests in the background has it ignored.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from server import lifeline\n"
    "lifeline.hold()\n"
    "lifeline.follow()\n"
    "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[1]])\n"
    "time.sleep(60)\n"
)


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
    assert gone(children, within_s=5), alive(children)
    server.stdout.close()
