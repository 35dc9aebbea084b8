"""docs/tutorial.md does what it says, against a real server."""

from pathlib import Path

import pytest

from tests.docs.pages import follow
from tests.real.conftest import Server


@pytest.mark.timeout(600)  # two trainings
def test_every_command_prints_what_the_page_says(server: Server, tmp_path: Path) -> None:
    instead = {"http://127.0.0.1:8000": server.url, "~/.local/share/loraplex": str(server.home)}
    assert follow("tutorial.md", instead, tmp_path) == 10
