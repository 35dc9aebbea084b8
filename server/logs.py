"""What the server and its commands say, on standard error: lines for people, or JSON for machines.

Lines are on how things go; a request has one only in JSON, where each object is one line.
"""

import json
import logging
import logging.config
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

console = Console(stderr=True, highlight=False)

_CONFIG = Path(__file__).with_name("logging.json")
_JSON = "_LORAPLEX_JSON_LOGS"  # set for the engine's processes as well


def as_json() -> None:
    """From now on JSON, here, in vLLM and in processes that this one starts."""
    os.environ[_JSON] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(_CONFIG))
    _log()


def say(line: str) -> None:
    """A line on how things go."""
    if _JSON in os.environ:
        _log().info(line)
    else:
        console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {line}", soft_wrap=True)


def complain(text: str) -> None:
    """What went wrong, a line each."""
    for line in text.splitlines():
        if _JSON in os.environ:
            _log().error(line)
        else:
            console.print(f"loraplex: {line}", style="red", markup=False, soft_wrap=True)


def note(event: str, **fields: Any) -> None:
    """Something that only machines care for."""
    if _JSON in os.environ:
        _log().info(event, extra=fields)


@cache
def _log() -> logging.Logger:
    logging.config.dictConfig(json.loads(_CONFIG.read_text()))
    return logging.getLogger("loraplex")
