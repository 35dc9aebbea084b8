"""Where adapters are read and checked."""

import os
import subprocess
import sys

import pytest

from server.imports import NICE

PROGRAM = """
import asyncio, os
from server.imports import Imports

parts = dict.fromkeys(("store", "ingest", "allowed", "prove"))
imports = Imports(**parts, max_bytes=0, timeout_s=0)
print(asyncio.run(imports.check(os.getpriority, os.PRIO_PROCESS, 0)))
"""


@pytest.mark.parametrize("nicer", [0, 19])
def test_checks_yield_to_the_engine_and_never_ask_for_more_than_the_server_has(nicer: int) -> None:
    """Raising a priority is for root only: anybody else's checks would not start."""
    command = ["nice", f"-n{nicer}", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    own = min(os.getpriority(os.PRIO_PROCESS, 0) + nicer, 19)
    assert int(done.stdout) == max(NICE, own)
