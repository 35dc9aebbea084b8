"""docs/reference is what its generator writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("api.md", "metrics.md", "settings.md")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a process of its own: in this one, other tests have registered series."""
    folder = tmp_path_factory.mktemp("reference")
    done = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--out", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_generator_writes(written: Path, name: str) -> None:
    committed = (ROOT / "docs" / "reference" / name).read_text()
    assert committed == (written / name).read_text(), "run python -m docs.generate"


def test_there_are_no_other_pages(written: Path) -> None:
    assert sorted(page.name for page in written.iterdir()) == sorted(PAGES)
    assert sorted(page.name for page in (ROOT / "docs" / "reference").iterdir()) == sorted(PAGES)
