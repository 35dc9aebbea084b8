from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import NoSpace, StoreError
from adapters.store import Store, digest


def everything(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


def staged(store: Store, made, folder: Path) -> tuple[Path, str]:
    made.write(folder)
    return folder, digest(folder)


def seal(store: Store, made) -> str:
    with store.staging() as folder:
        made.write(folder)
        name = digest(folder)
        store.seal(folder, name)
    return name


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**32), st.none() | st.dictionaries(words, words, max_size=2))
def test_digest_is_of_the_content(make, seed, metadata):
    shuffle = random.Random(seed).sample
    first, second = make(), make()
    second.metadata = metadata
    second.config = {k: second.config[k] for k in shuffle(list(second.config), len(second.config))}
    second.config["target_modules"] = shuffle(second.config["target_modules"], 2)
    with tempfile.TemporaryDirectory() as root:
        a = first.write(Path(root, "a"))
        order = shuffle(list(second.tensors), len(second.tensors))
        b = second.write(Path(root, "b"), order=order)
        (b / "README.md").write_text("skipped")
        os.utime(b / "adapter_config.json", (1, 1))
        assert digest(a) == digest(b)
        assert digest(a).startswith("sha256:") and len(digest(a)) == 71


def test_other_content_has_another_digest(make, tmp_path):
    made = [
        make(),
        make(seed=1),
        make(lora_alpha=9),
        make(dtype="F16"),
        make(rank_pattern={"a": 1, "b": 2}),
        make(rank_pattern={"b": 2, "a": 1}),
        make(target_modules=["q_proj"]),
    ]
    name = next(iter(made[0].tensors))
    bent = make()
    dtype, numbers = bent.tensors[name]
    bent.tensors[name] = (dtype, numbers.reshape(numbers.shape[::-1]))
    moved = make()
    moved.tensors[name + "x"] = moved.tensors.pop(name)
    digests = {digest(m.write(tmp_path / str(i))) for i, m in enumerate([*made, bent, moved])}
    assert len(digests) == len(made) + 2


def test_sealed_is_there_and_read_only(make, tmp_path):
    store = Store(tmp_path)
    with store.staging() as folder:
        make().write(folder)
        (folder / "README.md").write_text("x")
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "optimizer.pt").write_text("x")
        name = digest(folder)
        assert not store.has(name)
        place = store.seal(folder, name)
    assert store.has(name) and place == store.path(name)
    assert sorted(os.listdir(place)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {(place / f).stat().st_mode & 0o777 for f in os.listdir(place)} == {0o444}
    assert digest(place) == name
    assert len(everything(tmp_path)) == 2


def test_staging_leaves_nothing_behind(make, tmp_path):
    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.staging() as folder:
        make().write(folder)
        raise RuntimeError
    assert everything(tmp_path) == []
    assert os.listdir(tmp_path / "incoming") == []


def test_sealing_twice_keeps_the_first(make, tmp_path):
    store = Store(tmp_path)
    name = seal(store, make())
    inode = (store.path(name) / "adapter_config.json").stat().st_ino
    assert seal(store, make()) == name
    assert (store.path(name) / "adapter_config.json").stat().st_ino == inode
    assert len(everything(tmp_path)) == 2


def test_only_staging_folders_are_sealed(make, tmp_path):
    folder = make().write(tmp_path / "mine")
    with pytest.raises(ValueError):
        Store(tmp_path / "store").seal(folder, digest(folder))
    assert folder.is_dir()


@pytest.mark.parametrize("name", ["", "sha256:ab", "sha256:" + "/" * 64, "sha256:../" + "a" * 61])
def test_a_path_is_only_for_a_digest(tmp_path, name):
    with pytest.raises(ValueError):
        Store(tmp_path).path(name)


def test_everything_is_synced_before_the_name_is_there(make, tmp_path, monkeypatch):
    store = Store(tmp_path)
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(handle: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def note_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with store.staging() as folder:
        make().write(folder)
        name = digest(folder)
        store.seal(folder, name)
        assert events == [
            "sync adapter_config.json",
            "sync adapter_model.safetensors",
            f"sync {folder.name}",
            "rename",
            f"sync {name[7:9]}",
            "sync sealed",
        ]


def test_delete_and_delete_again(make, tmp_path):
    store = Store(tmp_path)
    name = seal(store, make())
    store.delete(name)
    assert not store.has(name) and everything(tmp_path) == []
    store.delete(name)


def test_an_interrupted_delete_leaves_no_half_adapter(make, tmp_path, monkeypatch):
    store = Store(tmp_path)
    name = seal(store, make())

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(StoreError):
        patched.setattr(shutil, "rmtree", fail)
        store.delete(name)
    assert not store.has(name)
    Store(tmp_path).sweep()
    assert everything(tmp_path) == []


def form_of(store: Store, name: str, made, key: str = "engine-test") -> Path:
    with store.staging() as folder:
        (folder / key).mkdir()
        made.write(folder / key)
        return store.seal_form(folder / key, name, key)


def test_sweep_removes_what_is_half_done_and_nothing_else(make, tmp_path):
    store = Store(tmp_path)
    kept = seal(store, make())
    for left in ("incoming/half", "trash/half", "sealed/zz/not-a-digest"):
        make(seed=2).write(tmp_path / left)
    (tmp_path / "incoming" / "file").write_text("x")
    store.sweep()
    assert list(store.sealed()) == [kept]
    assert not os.listdir(tmp_path / "incoming") and not os.listdir(tmp_path / "trash")


def test_forms_are_sealed_with_their_adapter_or_later(make, tmp_path):
    store = Store(tmp_path)
    with store.staging() as folder:
        make().write(folder)
        name = digest(folder)
        make(dtype="BF16").write(folder / "engine-a")
        (folder / "engine-a" / "digest").unlink(missing_ok=True)
        store.seal(folder, name)
    assert store.has_form(name, "engine-a") and not store.has_form(name, "engine-b")
    form_of(store, name, make(dtype="F16"), "engine-b")
    assert store.has_form(name, "engine-b")
    assert digest(store.path(name)) == name
    assert store.damaged_forms(name) == [] and store.damage(name, full=True) is None
    store.delete(name)
    assert everything(tmp_path) == []


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    overwrite(path, bytes(data))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda place: flip(place / "adapter_model.safetensors"), "not what was sealed"),
        (lambda place: overwrite(place / "adapter_config.json", b"{}"), "not what was sealed"),
        (lambda place: overwrite(place / "adapter_model.safetensors", b""), "not what was sealed"),
        (lambda place: (place / "adapter_config.json").unlink(), "adapter_config.json is gone"),
        (lambda place: shutil.rmtree(place), "folder is gone"),
        (lambda place: os.truncate(place / "adapter_model.safetensors", 99), "not what was"),
    ],
)
def test_damage_is_found_and_the_same_bytes_mend_it(make, tmp_path, harm, said):
    store = Store(tmp_path)
    name = seal(store, make())
    assert store.damage(name) is None
    harm(store.path(name))
    assert said in store.damage(name)
    assert seal(store, make()) == name
    assert store.damage(name) is None and store.damage(name, full=True) is None
    assert not os.listdir(tmp_path / "trash")


def test_what_keeps_its_time_is_found_by_a_full_check(make, tmp_path):
    store = Store(tmp_path)
    weights = store.path(seal(store, make())) / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    flip(weights)
    os.utime(weights, ns=(before, before))
    (name,) = store.sealed()
    assert store.damage(name) is None
    assert "not what was sealed" in store.damage(name, full=True)


def test_another_adapters_files_are_told_by_their_times(make, tmp_path):
    store = Store(tmp_path)
    name, other = seal(store, make()), seal(store, make(seed=1))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (store.path(name) / file).unlink()
        shutil.copy2(store.path(other) / file, store.path(name) / file)
    assert "not what was sealed" in store.damage(name)
    assert store.damage(other) is None


def test_another_adapters_form_is_told_by_its_times(make, tmp_path):
    store = Store(tmp_path)
    name, other = seal(store, make()), seal(store, make(seed=1))
    form, others = (form_of(store, each, make(dtype="BF16", seed=9)) for each in (name, other))
    assert store.has_form(name, "engine-test") and store.has_form(other, "engine-test")
    shutil.rmtree(form)
    shutil.copytree(others, form)
    assert not store.has_form(name, "engine-test")


def test_a_copy_from_a_backup_is_read_once(make, tmp_path, monkeypatch):
    store = Store(tmp_path)
    name = seal(store, make())
    os.utime(store.path(name) / "adapter_config.json")
    assert store.damage(name) is None
    monkeypatch.setattr("adapters.store.digest", None)
    assert store.damage(name) is None


def test_a_damaged_form_is_removed(make, tmp_path):
    store = Store(tmp_path)
    name = seal(store, make())
    form = form_of(store, name, make(dtype="BF16"))
    flip(form / "adapter_model.safetensors")
    assert not store.has_form(name, "engine-test")
    assert store.damaged_forms(name) == ["engine-test"]
    assert not form.exists() and store.damage(name, full=True) is None


@pytest.mark.parametrize("which", ["form", "adapter"])
def test_a_folder_that_nobody_may_enter_can_be_replaced(make, tmp_path, which):
    store = Store(tmp_path)
    name = seal(store, make())
    form = form_of(store, name, make(dtype="BF16"))
    (form if which == "form" else store.path(name)).chmod(0)
    form_of(store, name, make(dtype="BF16")) if which == "form" else store.delete(name)
    assert store.has_form(name, "engine-test") == (which == "form")
    assert not os.listdir(tmp_path / "trash")


def test_a_full_disk_is_said_to_be_full(make, tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NoSpace, match="Free space"), store.staging() as folder:
        make().write(folder)
        name = digest(folder)
        monkeypatch.setattr(os, "fsync", full)
        store.seal(folder, name)
    assert not store.has(name)
    assert everything(tmp_path) == []


def test_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        Store(tmp_path / "file" / "store")


def test_threads_sealing_the_same_bytes(make, tmp_path):
    store = Store(tmp_path)
    barrier, failures = threading.Barrier(8), []

    def work() -> None:
        try:
            with store.staging() as folder:
                make().write(folder)
                name = digest(folder)
                barrier.wait()
                store.seal(folder, name)
                assert store.has(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(everything(tmp_path)) == 2
    assert os.listdir(tmp_path / "incoming") == []


def test_digests_do_not_depend_on_the_process(make, tmp_path):
    folder = make().write(tmp_path)
    code = "import sys, pathlib, adapters.store as s; print(s.digest(pathlib.Path(sys.argv[1])))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()}
    shown = subprocess.run(
        [sys.executable, "-c", code, folder],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == digest(folder)
