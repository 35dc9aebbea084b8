"""Store and registry held against each other, and what a load finds on the way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from adapters.audit import audit
from adapters.errors import InvalidAdapter, StoreError, VersionQuarantined
from adapters.ingest import Ingest, Rules
from adapters.store import digest

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def ingest(store, registry, base) -> Ingest:
    return Ingest(store, registry, base, Rules(8))


@pytest.fixture
def upload(store, ingest):
    def run(made, name="sql"):
        with store.staging() as folder:
            made.write(folder)
            return ingest.ingest(folder, name, "upload")[0]

    return run


def flip(path: Path, keep_time: bool = False) -> None:
    before = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(before, before))


def test_a_whole_store_has_nothing_to_say(make, upload, store, registry):
    upload(make()), upload(make(seed=1)), upload(make(seed=1), name="code")
    for full in (False, True):
        found = audit(store, registry, full)
        assert (found.checked, found.damaged, found.mended, found.orphans) == (2, {}, [], [])


def test_what_is_gone_or_altered_is_quarantined_and_all_else_served(
    make, upload, store, registry, ingest
):
    kept, gone, bent, cut = (upload(make(seed=i), name) for i, name in enumerate("abcd"))
    shutil.rmtree(store.path(gone.digest))
    flip(store.path(bent.digest) / WEIGHTS)
    os.truncate(store.path(cut.digest) / "adapter_config.json", 5)
    found = ingest.audit()
    assert set(found.damaged) == {gone.digest, bent.digest, cut.digest}
    assert registry.resolve("a").id == kept.id
    for name, reason in (("b", "gone"), ("c", "not what was"), ("d", "not what was")):
        with pytest.raises(VersionQuarantined, match=reason):
            registry.resolve(name)
        (version,) = registry.get(name).versions
        assert version.state == "quarantined" and reason in version.reason
    assert audit(store, registry, full=True).damaged.keys() == found.damaged.keys()


def test_only_a_full_audit_sees_what_kept_its_time(make, upload, store, registry):
    version = upload(make())
    flip(store.path(version.digest) / WEIGHTS, keep_time=True)
    assert audit(store, registry).damaged == {}
    assert list(audit(store, registry, full=True).damaged) == [version.digest]


def test_what_a_full_audit_found_stays_found(make, upload, store, registry):
    """A start, and the upload that is to mend it, look only at the time of modification."""
    version = upload(make())
    weights = store.path(version.digest) / WEIGHTS
    flip(weights, keep_time=True)
    assert audit(store, registry, full=True).damaged
    assert list(audit(store, registry).damaged) == [version.digest]
    with pytest.raises(VersionQuarantined):
        registry.resolve("sql")
    assert upload(make()).number == 1
    assert digest(store.path(version.digest)) == version.digest
    assert audit(store, registry, full=True).damaged == {}


def test_bytes_that_come_back_are_served_again(make, upload, store, registry, tmp_path):
    version = upload(make())
    shutil.move(store.path(version.digest), tmp_path / "aside")
    assert audit(store, registry).damaged
    shutil.copytree(tmp_path / "aside", store.path(version.digest))
    assert audit(store, registry).mended == [version.digest]
    assert registry.resolve("sql").id == version.id


def test_the_same_upload_mends_all_versions_with_its_bytes(make, upload, store, registry):
    version, other = upload(make()), upload(make(), name="code")
    flip(store.path(version.digest) / WEIGHTS)
    audit(store, registry)
    assert upload(make()).number == 1
    assert registry.resolve("sql").id == version.id
    assert registry.resolve("code").id == other.id
    assert audit(store, registry, full=True).damaged == {}


def test_sound_bytes_do_not_bring_back_what_is_not_served_for_another_reason(
    make, upload, store, registry
):
    version = upload(make())
    registry.quarantine(version.digest, "The engine has ended.", lasting=True)
    assert audit(store, registry, full=True).mended == []
    with pytest.raises(VersionQuarantined):
        registry.resolve("sql@1")


def test_a_form_that_could_not_be_loaded_is_made_again_if_it_is_damaged(make, upload, ingest):
    digest = upload(make()).digest
    assert not ingest.mend(digest)
    flip(ingest.form(digest) / WEIGHTS, keep_time=True)
    ingest.vouch(digest)
    assert ingest.mend(digest)
    ingest.vouch(digest)
    assert ingest.form(digest).is_dir() and not ingest.mend(digest)


def test_a_form_that_cannot_be_read_is_left(make, upload, ingest, store, monkeypatch):
    digest = upload(make()).digest

    def fail(_: str) -> list[str]:
        raise StoreError("Could not check an adapter's forms: Permission denied.")

    monkeypatch.setattr(store, "damaged_forms", fail)
    assert not ingest.mend(digest)
    assert ingest.form(digest).is_dir()


def test_orphans_are_named_and_not_touched(make, upload, store, registry, ingest):
    version = upload(make())
    registry.delete_adapter("sql")
    assert audit(store, registry).orphans == [version.digest]
    assert store.has(version.digest)
    assert ingest.collect(version.digest) and audit(store, registry).orphans == []


def test_one_that_cannot_be_read_does_not_end_the_audit(make, upload, store, registry, monkeypatch):
    first, second = upload(make()), upload(make(seed=1), name="code")
    look = store.damage

    def fail(digest: str, full: bool) -> str | None:
        if digest == first.digest:
            raise StoreError("Could not check an adapter: Input/output error.")
        return look(digest, full)

    monkeypatch.setattr(store, "damage", fail)
    assert list(audit(store, registry, full=True).damaged) == [first.digest]
    assert registry.resolve("code").id == second.id


def test_what_another_process_deletes_or_takes_in_meanwhile_is_not_damaged(
    make, upload, store, registry, ingest, monkeypatch
):
    gone, back = upload(make()), upload(make(seed=1), name="code")
    look = store.damage

    def race(digest: str, full: bool) -> str | None:
        """The look finds nothing, and the world has moved on when it is told."""
        monkeypatch.setattr(store, "damage", look)
        for each in registry.delete_adapter("sql"):
            ingest.collect(each)
        shutil.move(store.path(back.digest), store.path(back.digest).with_name("aside"))
        said = look(digest, full)
        shutil.move(store.path(back.digest).with_name("aside"), store.path(back.digest))
        return said

    monkeypatch.setattr(
        registry, "digests", lambda state=None: {back.digest} if not state else set()
    )
    monkeypatch.setattr(store, "damage", race)
    assert audit(store, registry).damaged == {}
    assert registry.resolve("code").state == "ready"
    monkeypatch.setattr(
        registry, "digests", lambda state=None: {gone.digest} if not state else set()
    )
    assert audit(store, registry).damaged == {}


# What a load finds ---------------------------------------------------------------------------


def test_vouching_looks_and_does_nothing_else(make, upload, ingest, monkeypatch):
    version = upload(make())
    monkeypatch.setattr("adapters.store.digest", None)  # nothing is read
    ingest.vouch(version.digest)


@pytest.mark.parametrize("harm", [lambda f: shutil.rmtree(f), lambda f: flip(f / WEIGHTS)])
def test_a_form_that_is_gone_or_altered_is_made_again(make, upload, ingest, harm):
    version = upload(make())
    form = ingest.form(version.digest)
    before = digest(form)
    harm(form)
    ingest.vouch(version.digest)
    assert digest(form) == before


def test_a_form_cannot_be_made_of_damaged_bytes(make, upload, ingest, store, registry):
    version = upload(make())
    shutil.rmtree(ingest.form(version.digest))
    flip(store.path(version.digest) / WEIGHTS)
    with pytest.raises(VersionQuarantined, match="not what was sealed"):
        ingest.vouch(version.digest)
    with pytest.raises(VersionQuarantined):
        registry.resolve("sql")


def test_another_type_or_base_of_the_engine_gets_a_form_of_its_own(
    make, upload, store, registry, base, ingest
):
    version = upload(make())
    half = Ingest(store, registry, base, Rules(8, "F16"))
    half.vouch(version.digest)
    assert half.form(version.digest) != ingest.form(version.digest)
    assert half.form(version.digest).is_dir() and ingest.form(version.digest).is_dir()
    with pytest.raises(InvalidAdapter) as refused:
        Ingest(store, registry, base, Rules(2, "F32")).vouch(version.digest)
    assert [p.code for p in refused.value.problems] == ["rank_above_max"]
    assert registry.resolve("sql").id == version.id
    assert audit(store, registry, full=True).damaged == {}
