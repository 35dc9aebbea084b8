"""A base model from the hub: fetched once, and with how far it is."""

import os
import re
from pathlib import Path

from tests.adapters.hub_server import REPO, Hub
from tests.terminal import Terminal

FETCH = """
import sys
from server.config import Settings
from server.engine import base_model
print("folder", base_model.fetch(Settings.read(["--model", sys.argv[1]]), print))
"""


def test_a_download_shows_rate_and_time_left(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": os.urandom(3_000_000), "evil.bin": b"x"}
    with Hub(files, pause_s=0.02) as hub:
        cache = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        with Terminal(REPO, code=FETCH, HF_HUB_OFFLINE="0", **cache) as screen:
            assert screen.end() == 0, screen.text
        said = screen.text
        assert re.search(r"fetching +\d+%\|.*B/3\.00MB \[.*B/s, \d\d:\d\d left\]", said), said
        assert "Fetching" not in said and "Downloading" not in said  # the library's own
        folder = Path(said.rpartition("folder ")[2].strip())
        assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
        assert sorted(each.name for each in folder.iterdir()) == sorted({*files} - {"evil.bin"})
