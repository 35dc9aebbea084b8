"""Compiling the CPU op: what cannot be compiled or loaded is a warning with its reason."""

import shutil
from pathlib import Path

import pytest
import torch

from server.engine.cpu import build, op


def test_a_compiler_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")
    with pytest.raises(build.BuildError, match="/no/such/compiler: No such file"):
        build.build()
    build.main()
    warning = capsys.readouterr().err
    assert "warning: the CPU LoRA op was not compiled: /no/such/compiler" in warning
    assert len(warning.splitlines()) == 1


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler .*apt-get install g\+\+"):
        build.build()


def test_the_compilers_first_error_is_said_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\necho "in file included" >&2\necho "a.cpp:1: error: boom" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    before = sorted(build.HERE.iterdir())
    with pytest.raises(build.BuildError, match=r"^g\+\+: a\.cpp:1: error: boom$"):
        build.build()
    assert sorted(build.HERE.iterdir()) == before


def test_a_library_is_named_for_what_it_was_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = build.library()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert build.library() != mine


@pytest.mark.parametrize(
    ("content", "why"), [(None, "it was not compiled"), (b"not a library", "file too short")]
)
def test_without_a_library_that_loads_it_is_the_form_in_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, why: str
) -> None:
    library = tmp_path / "lib.so"
    if content:
        library.write_bytes(content)
    monkeypatch.setattr(build, "library", lambda: library)
    fragment = torch.library.Library("loraplex_test", "FRAGMENT")
    fragment.define(op.SCHEMA)
    found = op._load(fragment)
    assert isinstance(found.op, op.Reference)
    assert why in found.why
