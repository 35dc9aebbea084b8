"""Makes reading an adapter in a worker take the seconds that are in the file SLOW_DISK names.

Python imports this by itself in every process that has this folder on its PYTHONPATH; only the
engine's workers import what it changes. While the file is not there, nothing waits.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

MODULE = "server.engine.staging"


def wait() -> None:
    """As a disk that answers late: nobody can tell whoever reads to give up."""
    slow = Path(os.environ["SLOW_DISK"])
    began = time.monotonic()
    try:
        while time.monotonic() - began < float(slow.read_text()):
            time.sleep(0.02)
    except (FileNotFoundError, ValueError):  # gone, or just being written
        pass


def slow_down(file: Any) -> None:
    read = file._bytes

    def late(self: Any, *args: Any) -> Any:
        wait()
        return read(self, *args)

    file._bytes = late


class Finder:
    """Stands before all other finders until the module is asked for, and then steps aside."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def slowed(module: Any) -> None:
            execute(module)
            slow_down(module._File)

        spec.loader.exec_module = slowed
        return spec


sys.meta_path.insert(0, Finder())
