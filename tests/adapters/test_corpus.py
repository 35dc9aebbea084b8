from __future__ import annotations

import ctypes
import gc
import os
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.folder import CONFIG, PICKLE, WEIGHTS
from adapters.store import digest
from tests.adapters.conftest import make
from tests.adapters.corpus import CASES, KINDS, Case, Place, pack, place

# Bytes that all of them may leave behind, as the system sees it, and that one may take for a time.
# The most is taken by a million dimensions, as a list.
_LEFT = 16 * 2**20
_PEAK = 32 * 2**20


@pytest.fixture(scope="module")
def taking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("place")) as made:
        yield made


def resident() -> int:
    """Bytes of memory this process has, less what is free and only kept for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_corpus_is_large_and_its_names_are_unique():
    assert len(CASES) > 400
    assert [name for name, count in Counter(c.name for c in CASES).items() if count > 1] == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_for_the_right_reasons_and_nothing_is_left(taking: Place, tmp_path, case: Case):
    path = case.write(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    try:
        assert taking.refusal(path) == case.codes
        assert taking.remains() == []
    finally:
        taking.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_good_adapter_goes_in_after_all_of_them_and_memory_is_where_it_was(tmp_path):
    with place(tmp_path) as taking:
        refuse_all(taking, tmp_path / "first")  # what is imported and cached once
        before = resident()
        tracemalloc.start()
        try:
            peaks = refuse_all(taking, tmp_path / "second")
        finally:
            tracemalloc.stop()
        assert resident() - before < _LEFT
        assert {name for name, peak in peaks.items() if peak > _PEAK} == set()
        assert taking.remains() == []
        version = taking.take(make().write(tmp_path / "good"))
        assert taking.remains() == [version.digest, "sql", version.digest]


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_pickles_where_they_are_allowed(tmp_path, kind):
    def upload(name: str, content: object) -> Path:
        root = tmp_path / name
        folder = make().write(root / "adapter")
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / PICKLE)
        if kind is None:
            return folder
        entries = [(n, (folder / n).read_bytes()) for n in (CONFIG, PICKLE)]
        (root / "archive").write_bytes(pack(kind, entries))
        return root / "archive"

    twin = make().write(tmp_path / "twin")
    tensors = load_file(twin / WEIGHTS)
    with place(tmp_path, allow_pickle=True) as taking:
        hostile = upload("hostile", {**tensors, "b": Runs(tmp_path / "ran")})
        assert taking.refusal(hostile) == {"pickle_unreadable"}
        assert not (tmp_path / "ran").exists() and taking.remains() == []
        assert taking.take(upload("good", tensors)).digest == digest(twin)


def refuse_all(taking: Place, root: Path) -> dict[str, int]:
    """Bytes that each input took at most while it was judged; 0 while memory is not traced."""
    peaks = {}
    for number, case in enumerate(CASES):
        folder = root / str(number)
        folder.mkdir(parents=True)
        path = case.write(folder)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        taking.refusal(path)
        peaks[case.name] = tracemalloc.get_traced_memory()[1] - held
    return peaks
