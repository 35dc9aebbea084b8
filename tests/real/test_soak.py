"""A server under load, while adapters come and go, is at its end what it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINUTES = float(os.environ.get("SOAK_MINUTES", "0"))
AROUND_S = 400  # a start, finding out what the server can do, and an end


@pytest.mark.skipif(not MINUTES, reason="takes as long as you say: SOAK_MINUTES=10")
@pytest.mark.timeout(60 * MINUTES + AROUND_S)
def test_nothing_fails_and_nothing_grows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", f"{MINUTES}"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["well"] and not summary["failed"], summary
    print(json.dumps(summary, indent=1))
