"""Runs the commands of a page, and holds what they print against what it says.

Python blocks are saved under the name in their first line. Bash blocks run in one shell; the text
block behind one is all that it prints, `…` standing for anything. Blocks marked `sh` are to be
read, or prepare what a test has prepared in its way.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
MARK = "@@ a block ends @@"


def follow(page: str, instead: dict[str, str], folder: Path) -> int:
    """Runs all of a page in `folder`, with other texts for some; returns how many blocks it ran."""
    text = (ROOT / "docs" / page).read_text()
    for old, new in instead.items():
        assert old in text
        text = text.replace(old, new)
    commands: list[str] = []
    promised: list[str] = []
    for indent, kind, block in BLOCK.findall(text):
        block = textwrap.dedent(block) if indent else block
        if kind == "python":
            (name,) = re.findall(r"\A# (\w+\.py)\b", block)
            (folder / name).write_text(block)
        elif kind == "bash":
            commands.append(block)
            promised.append("")
        elif kind == "text":
            assert promised[-1] == ""
            promised[-1] = block
        else:
            assert kind == "sh"
    tools = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", "".join(f"{c}\necho '{MARK}'\n" for c in commands)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": ""},
    )
    printed = done.stdout.split(MARK)[:-1]
    for command, wanted, got in zip(commands, promised, printed, strict=False):
        pattern = ".*".join(re.escape(part) for part in wanted.strip().split("…"))
        assert re.fullmatch(pattern, got.strip(), re.DOTALL), f"{command}\nprinted\n{got}"
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert len(printed) == len(commands)
    return len(commands)
