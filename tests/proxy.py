"""HAProxy with our configuration, before two servers."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

CONFIG = Path(__file__).parents[1] / "deploy" / "haproxy.cfg"
START_S = 30


@contextmanager
def proxy(a: str, b: str) -> Iterator[str]:
    """Before the servers at `a` and `b`, HOST:PORT each; the URL where it listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        front = f"127.0.0.1:{probe.getsockname()[1]}"
    names = {"FRONT": front, "SERVER_A": a, "SERVER_B": b}
    process = subprocess.Popen(["haproxy", "-db", "-f", CONFIG], env=os.environ | names)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                if httpx.get(f"http://{front}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://{front}"
    finally:
        process.terminate()
        process.wait(10)
