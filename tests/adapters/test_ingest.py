from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from adapters.database import Database
from adapters.errors import (
    InvalidAdapter,
    InvalidName,
    NoSpace,
    RegistryError,
    ReservedName,
)
from adapters.ingest import Ingest, Rules
from adapters.registry import Registry
from adapters.store import Store, digest

RULES = Rules(max_rank=8, reserved=frozenset({"base", "tiny"}))


@pytest.fixture
def ingest(store, registry, base) -> Ingest:
    return Ingest(store, registry, base, RULES)


@pytest.fixture
def upload(store, ingest):
    def run(made, name="sql", **arguments):
        with store.staging() as folder:
            made.write(folder)
            return ingest.ingest(folder, name, "upload", **arguments)

    return run


def files(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if not p.is_dir()]


def nothing_stored(tmp_path: Path, registry: Registry) -> bool:
    left = os.listdir(tmp_path / "store" / "incoming")
    return not files(tmp_path / "store") and not left and not registry.list().data


def test_an_upload_becomes_a_version(make, upload, store, registry):
    made = make(base_model_name_or_path="org/other")
    version, created = upload(made, alias="prod", metadata={"team": "a"})
    assert created and version.number == 1
    assert store.has(version.digest)
    assert digest(store.path(version.digest)) == version.digest
    assert (version.rank, version.alpha, version.dtype) == (4, 8.0, "F32")
    assert version.target_modules == ("q_proj", "v_proj")
    assert version.parameters == version.algebra["parameters"] == 448
    assert (
        version.bytes == (store.path(version.digest) / "adapter_model.safetensors").stat().st_size
    )
    assert [w["code"] for w in version.checks["warnings"]] == ["base_model_differs"]
    assert registry.resolve("sql@prod").id == version.id


def test_the_same_bytes_again(make, upload):
    first, _ = upload(make())
    again, created = upload(make())
    assert (again, created) == (first, False)
    other, created = upload(make(), name="code")
    assert created and other.digest == first.digest
    second, created = upload(make(seed=1))
    assert created and second.number == 2


def test_everything_is_there_after_a_restart(make, upload, tmp_path, registry):
    version, _ = upload(make())
    registry.close()
    store, again = Store(tmp_path / "store"), Registry(Database.of(tmp_path))
    store.sweep()
    assert again.get("sql").versions == (version,)
    assert store.has(again.resolve("sql").digest)


def bad_adapters(make):
    nan = make()
    name = next(iter(nan.tensors))
    nan.tensors[name][1][0, 0] = np.nan
    return {
        "nonfinite": nan,
        "dora": make(use_dora=True),
        "rank_above_max": make(rank=9),
        "config_value": make(r="x"),
        "module_not_in_base": make(modules={"a.q_proj": (4, 4), "a.v_proj": (4, 4)}),
    }


@pytest.mark.parametrize(
    "code", ["nonfinite", "dora", "rank_above_max", "config_value", "module_not_in_base"]
)
def test_a_refused_adapter_leaves_nothing(make, upload, tmp_path, registry, code):
    with pytest.raises(InvalidAdapter) as refused:
        upload(bad_adapters(make)[code])
    assert code in [p.code for p in refused.value.problems]
    assert nothing_stored(tmp_path, registry)


def test_files_that_cannot_be_read_leave_nothing(store, ingest, tmp_path, registry):
    with pytest.raises(InvalidAdapter), store.staging() as folder:
        (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
        (folder / "adapter_config.json").write_text("{}")
        ingest.ingest(folder, "sql", "upload")
    assert nothing_stored(tmp_path, registry)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": "base"}, ReservedName),
        ({"name": "tiny"}, ReservedName),
        ({"name": "../x"}, InvalidName),
        ({"alias": "latest"}, ReservedName),
        ({"alias": "3"}, InvalidName),
    ],
)
def test_bad_names_are_refused_first(make, upload, tmp_path, registry, arguments, error):
    with pytest.raises(error):
        upload(make(use_dora=True), **arguments)
    assert nothing_stored(tmp_path, registry)


def test_a_failing_registry_leaves_no_bytes(make, upload, tmp_path, registry, monkeypatch):
    def fail(*_):
        raise RegistryError("down")

    with monkeypatch.context() as patched, pytest.raises(RegistryError):
        patched.setattr(registry, "add_version", fail)
        upload(make())
    assert nothing_stored(tmp_path, registry)
    assert upload(make())[1]


def test_a_failing_registry_takes_no_bytes_that_were_there(
    make, upload, store, registry, monkeypatch
):
    version, _ = upload(make())
    registry.delete_version("sql", 1)  # a request may still be using its bytes

    def fail(*_):
        raise RegistryError("down")

    with monkeypatch.context() as patched, pytest.raises(RegistryError):
        patched.setattr(registry, "add_version", fail)
        upload(make())
    assert store.has(version.digest)


def test_a_full_disk_leaves_nothing(make, upload, tmp_path, registry, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(NoSpace):
        patched.setattr("adapters.store.os.fsync", full)
        upload(make())
    assert nothing_stored(tmp_path, registry)


def test_bytes_are_synced_before_the_record_commits(make, upload, store, registry, monkeypatch):
    events = []
    seal, add = store.seal, registry.add_version

    def note_seal(*arguments):
        place = seal(*arguments)
        events.append("sealed")
        return place

    def note_add(name, digest, *arguments):
        assert store.has(digest)
        events.append("record")
        return add(name, digest, *arguments)

    monkeypatch.setattr(store, "seal", note_seal)
    monkeypatch.setattr(registry, "add_version", note_add)
    upload(make())
    assert events == ["sealed", "record"]


def test_check_stores_nothing(make, ingest, store, tmp_path, registry):
    with store.staging() as folder:
        make().write(folder)
        good = ingest.check(folder)
        make(use_dora=True, bias="all").write(folder)
        bad = ingest.check(folder)
        (folder / "adapter_config.json").write_text("nonsense")
        unreadable = ingest.check(folder)
    assert good.report.problems == () and good.algebra.parameters == 448
    assert [p.code for p in bad.report.problems] == ["dora", "bias"]
    assert bad.spec.rank == 4 and bad.algebra is None
    assert [p.code for p in unreadable.report.problems] == ["config_json"]
    assert unreadable.spec is None
    assert nothing_stored(tmp_path, registry)


def test_collecting(make, upload, ingest, store, registry):
    version, _ = upload(make())
    upload(make(), name="code")
    assert registry.delete_version("sql", 1) == []
    assert not ingest.collect(version.digest) and store.has(version.digest)
    assert registry.delete_adapter("code") == [version.digest]
    upload(make(), name="again")
    assert not ingest.collect(version.digest) and store.has(version.digest)
    registry.delete_adapter("again")
    assert ingest.collect(version.digest) and not store.has(version.digest)
    assert ingest.collect(version.digest)


def test_uploads_and_deletes_at_once_never_leave_a_record_without_bytes(
    make, upload, ingest, store, registry
):
    failures = []

    def work(name):
        try:
            for _ in range(8):
                version, _ = upload(make(), name=name)
                assert store.has(version.digest)
                for gone in registry.delete_adapter(name):
                    ingest.collect(gone)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in ("a", "b", "c", "d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert registry.digests() == set()
    assert list(store.sealed()) == []


def test_the_same_upload_from_many_threads(make, upload, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(upload(make()))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {v.number for v, _ in results} == {1}
    assert sum(created for _, created in results) == 1
    assert len(files(tmp_path / "store")) == 5  # two of the adapter, three of its form


def test_a_real_adapter_from_peft(peft_model, tiny_llama, store, registry):
    from adapters.base import BaseSpec

    ingest = Ingest(store, registry, BaseSpec.read(tiny_llama, "tiny-llama"), Rules(8))
    with store.staging() as folder:
        peft_model(r=8, lora_alpha=16, target_modules="all-linear").save_pretrained(folder)
        version, created = ingest.ingest(folder, "real", "upload")
    assert created and version.algebra["layers"][0]["scaling"] == 2.0
    assert sorted(os.listdir(store.path(version.digest))) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        ingest.form(version.digest).name,
    ]
