from __future__ import annotations

import os

import pytest

from adapters.errors import InvalidAdapter, StoreError, TooLarge
from adapters.sources.directory import copy
from adapters.sources.intake import Transfer


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


def code(folder, into) -> list[str]:
    with pytest.raises(InvalidAdapter) as refused:
        copy(folder, into, Transfer(10**6))
    return [p.code for p in refused.value.problems]


def test_only_the_two_files_are_copied(make, tmp_path, into):
    folder = make().write(tmp_path / "made")
    (folder / "README.md").write_text("x")
    copy(folder, into, Transfer(10**6))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (into / name).read_bytes() == (folder / name).read_bytes()
        assert (into / name).stat().st_ino != (folder / name).stat().st_ino
    assert len(os.listdir(into)) == 2


def test_links_are_refused(make, tmp_path, into):
    folder = make().write(tmp_path / "made")
    (tmp_path / "link").symlink_to(folder)
    assert code(tmp_path / "link", into) == ["not_a_folder"]
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere")
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere")
    assert code(folder, into) == ["not_a_regular_file"]
    assert os.listdir(into) == []


def test_what_is_missing(make, tmp_path, into):
    assert code(tmp_path / "nowhere", into) == ["not_a_folder"]
    folder = make().write(tmp_path / "made")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.pt")
    assert code(folder, into) == ["pickle_refused"]


def test_limits_and_existing_files(make, tmp_path, into):
    folder = make().write(tmp_path / "made")
    with pytest.raises(TooLarge):
        copy(folder, into, Transfer(300))
    assert os.listdir(into) == []  # the sizes are looked at first
    copy(folder, into, Transfer(10**6))
    with pytest.raises(StoreError):
        copy(folder, into, Transfer(10**6))
