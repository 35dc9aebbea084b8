from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidAdapter, InvalidSource, SourceForbidden, SourceNotFound, TooLarge
from adapters.sources import address as module
from adapters.sources import fetch
from adapters.sources.address import MAX_LENGTH, Address, Allowed
from adapters.sources.intake import Transfer


@pytest.mark.parametrize(
    ("text", "scheme", "place", "folder", "revision"),
    [
        ("hf://org/sql", "hf", "org/sql", "", None),
        ("hf://org/sql@v1.0/a/b@c", "hf", "org/sql", "a/b@c", "v1.0"),
        ("hf://My_Org/Sql-2.0/a b", "hf", "My_Org/Sql-2.0", "a b", None),
        ("hf://org/sql@refs%2Fpr%2F1", "hf", "org/sql", "", "refs/pr/1"),
        ("s3://bucket/team-a/sql", "s3", "bucket", "team-a/sql", None),
        ("s3://my.bucket", "s3", "my.bucket", "", None),
        ("gs://bucket_1/größe/x", "gs", "bucket_1", "größe/x", None),
        ("az://container/a:b@c", "az", "container", "a:b@c", None),
        ("file:///srv/a b/…", "file", "", "srv/a b/…", None),
        ("file:///x", "file", "", "x", None),
    ],
)
def test_what_an_address_says(text, scheme, place, folder, revision):
    address = Address.parse(text)
    assert (address.scheme, address.place, address.folder) == (scheme, place, folder)
    assert address.revision == revision
    assert str(address) == text
    assert Address.parse(text + "/") == address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no source"),
        ("org/sql", "is no source"),
        ("hf:org/sql", "is no source"),
        ("hf", "is no source"),
        ("http://example.com/x", "is no source. Write hf://org/repo"),
        ("HF://org/sql", "is no source"),
        (" hf://org/sql", "is no source"),
        ("/srv/adapters/sql", "is no source"),
        ("hf://", "not complete"),
        ("hf://org", "not complete"),
        ("hf://org/", "not complete"),
        ("hf://*", "cannot be a name"),
        ("hf:///sql", "empty part"),
        ("hf://org/@main", "empty part"),
        ("hf://org/sql@v1@v2", "After @"),
        ("hf://org/sql@", "After @"),
        ("hf://org/sql@../x", "After @"),
        ("hf://org/sql@a..b", "After @"),
        ("hf://org/sql@a%2F..%2Fb", "After @"),
        ("hf://org/sql@%2F", "After @"),
        ("hf://org/sql@a%252Fb", "After @"),
        ("hf://org/sql@a%00b", "After @"),
        ("hf://org/sql@a%3Fb", "After @"),
        ("hf://me@org/sql", "no user, password or port"),
        ("hf://me:secret@org/sql", "no user, password or port"),
        ("hf://../sql", "no . or .."),
        ("hf://org/a..b", "cannot be a name"),
        ("hf://org/a%2Fb", "percent-encoded"),
        ("hf://örg/sql", "cannot be a name"),
        ("s3://", "not complete"),
        ("s3:///x", "empty part"),
        ("s3://key:secret@bucket/x", "no user, password or port"),
        ("s3://bucket:80/x", "no user, password or port"),
        ("s3://bucket/x?versionId=1", "no query"),
        ("s3://bucket/x#y", "no query"),
        ("s3://bucket//x", "empty part"),
        ("s3://bucket/x//", "empty part"),
        ("s3://bucket/./x", "no . or .."),
        ("s3://bucket/x/..", "no . or .."),
        ("s3://bucket/%2e%2e/x", "percent-encoded"),
        ("s3://bucket/a%2Fb", "percent-encoded"),
        ("s3://bucket/a\\b", "backslash"),
        ("s3://bucket/a\nb", "cannot be printed"),
        ("s3://bucket/a\0b", "cannot be printed"),
        ("s3://bucket/a\u202eb", "cannot be printed"),
        ("s3://bucket/a\ud800b", "cannot be printed"),
        ("s3://[::1]/x", "no user, password or port"),
        ("gs://-x/y", "cannot be a name"),
        ("az://" + "c" * 300 + "/x", "cannot be a name"),
        ("file://srv/x", "absolute"),
        ("file://localhost/srv/x", "absolute"),
        ("file://", "absolute"),
        ("file:///", "not complete"),
        ("file:////srv", "empty part"),
        ("file:///srv/../etc", "no . or .."),
        ("file:///srv/%2e%2e/etc", "percent-encoded"),
        ("s3://bucket/" + "x" * MAX_LENGTH, "more than 2048"),
    ],
)
def test_what_is_no_address(text, message):
    with pytest.raises(InvalidSource) as refused:
        Address.parse(text)
    assert message in refused.value.message
    assert "Write" in refused.value.message
    assert "secret" not in refused.value.message
    assert refused.value.message.isprintable()


texts = st.text() | st.builds(
    lambda scheme, parts: scheme + "://" + "/".join(parts),
    st.sampled_from(["hf", "s3", "gs", "az", "file", "hf://", ""]),
    st.lists(st.text(st.sampled_from("ab.@%2fF\\:*-_\0 ~")) | st.text(), max_size=5),
)


@given(texts)
def test_any_text_is_an_address_or_refused(text):
    try:
        address = Address.parse(text)
    except InvalidSource as refused:
        assert refused.message.isprintable()
        return
    assert Address.parse(str(address)) == address
    assert str(address) in (text, text.removesuffix("/")) or address.revision is not None
    assert not {"", ".", ".."} & {*address.parts, *(address.revision or "x").split("/")}
    assert "\0" not in str(address)


@given(texts)
def test_any_text_is_a_prefix_or_refused(text):
    try:
        allowed = Allowed([text])
    except ValueError as refused:
        assert str(refused).isprintable()
    else:
        for other in ("s3://bucket/x", "hf://org/sql"):
            try:
                allowed.check(Address.parse(other))
            except SourceForbidden:
                continue
            assert text == "hf://*" or other.startswith(text.removesuffix("/"))


@pytest.mark.parametrize(
    ("prefix", "yes", "no"),
    [
        ("hf://*", ["hf://org/sql", "hf://other/x@v1/y"], ["s3://bucket/x", "file:///srv"]),
        ("hf://org", ["hf://org/sql", "hf://org/x@v1/y"], ["hf://org2/sql", "hf://or/g"]),
        (
            "hf://org/sql",
            ["hf://org/sql", "hf://org/sql@v1/y"],
            ["hf://org/sql2", "hf://org/x/sql"],
        ),
        ("hf://org/sql/y/", ["hf://org/sql@v1/y/z"], ["hf://org/sql", "hf://org/sql/yy"]),
        ("s3://bucket", ["s3://bucket", "s3://bucket/x"], ["s3://bucket2/x", "gs://bucket/x"]),
        ("s3://b/team-a", ["s3://b/team-a/x"], ["s3://b/team-abc", "s3://b", "s3://b/x/team-a"]),
        ("az://c/x", ["az://c/x/y"], ["az://c/y"]),
    ],
)
def test_a_prefix_covers_whole_parts(prefix, yes, no):
    allowed = Allowed([prefix])
    for text in yes:
        allowed.check(Address.parse(text))
    for text in no:
        with pytest.raises(SourceForbidden, match="--import-from PREFIX"):
            allowed.check(Address.parse(text))


def test_nothing_is_allowed_by_default():
    for text in ("hf://org/sql", "s3://bucket/x", "gs://b/x", "az://c/x", "file:///etc"):
        with pytest.raises(SourceForbidden, match="--import-from"):
            Allowed().check(Address.parse(text))


@pytest.mark.parametrize(
    "text",
    ["", "x", "/srv", "hf://", "file:///", "file://", "s3://", "s3://*", "hf://*/x", "hf://o/r@v1"],
)
def test_prefixes_that_mean_nothing(text):
    with pytest.raises(ValueError, match=r".+") as refused:
        Allowed(["hf://org", text])
    assert not isinstance(refused.value, InvalidSource)


def test_the_libraries_of_other_sources_are_imported_when_needed():
    code = (
        "import sys, adapters.sources as s; s.Allowed; "
        "sys.exit(bool({'httpx2', 'huggingface_hub', 'obstore'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Folders of this machine --------------------------------------------------------------------


@pytest.fixture
def root(make, tmp_path):
    """A root, an adapter in it and one outside; the test's own folder may itself be a link."""
    make().write(tmp_path / "root" / "team" / "sql")
    make().write(tmp_path / "secret" / "sql")
    (tmp_path / "into").mkdir()
    return tmp_path / "root"


@pytest.fixture
def bring(root, tmp_path):
    def run(path, allowed=None, max_bytes=10**6) -> set[str]:
        allowed = allowed or Allowed([f"file://{root}"])
        fetch(Address.parse(f"file://{path}"), tmp_path / "into", Transfer(max_bytes), allowed)
        return set(os.listdir(tmp_path / "into"))

    return run


BOTH = {"adapter_config.json", "adapter_model.safetensors"}


def test_a_folder_in_a_root(root, bring, tmp_path):
    handles = len(os.listdir("/proc/self/fd"))
    assert bring(root / "team" / "sql") == BOTH
    assert len(os.listdir("/proc/self/fd")) == handles


def test_roots_and_folders_over_links_that_stay_inside(root, bring, tmp_path):
    (tmp_path / "link").symlink_to(root)
    (root / "latest").symlink_to(root / "team")
    assert bring(tmp_path / "link" / "latest" / "sql") == BOTH
    shutil.rmtree(tmp_path / "into")
    (tmp_path / "into").mkdir()
    assert bring(root / "team" / "sql", Allowed([f"file://{tmp_path}/link"])) == BOTH


def test_folders_outside(root, bring, tmp_path):
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("..")
    for path in (
        tmp_path / "secret" / "sql",
        tmp_path / "nowhere",
        root / "out" / "sql",
        root / "up" / "secret" / "sql",
        tmp_path / "root-2",
        tmp_path,
    ):
        with pytest.raises(SourceForbidden, match="--import-from"):
            bring(path)
    assert os.listdir(tmp_path / "into") == []


def test_folders_that_are_none(root, bring, tmp_path):
    (root / "file").write_text("x")
    (root / "loop").symlink_to("loop")
    for path in (root / "nowhere" / "x", root / "file", root / "file" / "x", root / ("x" * 300)):
        with pytest.raises(SourceNotFound):
            bring(path)
    (root / "sql").symlink_to("team/sql")
    for path in (root / "sql", root / "loop"):
        with pytest.raises(SourceForbidden, match="is a link"):
            bring(path)
    assert os.listdir(tmp_path / "into") == []


def test_files_that_are_links(root, bring, tmp_path):
    config = root / "team" / "sql" / "adapter_config.json"
    config.unlink()
    config.symlink_to(tmp_path / "secret" / "sql" / "adapter_config.json")
    with pytest.raises(InvalidAdapter):
        bring(root / "team" / "sql")
    assert os.listdir(tmp_path / "into") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(root, bring):
    (root / "team" / "sql").chmod(0)
    with pytest.raises(SourceForbidden, match="permissions"):
        bring(root / "team" / "sql")
    (root / "team" / "sql").chmod(0o700)


@pytest.mark.parametrize("swapped", ["team", "team/sql"])
def test_a_folder_swapped_for_a_link_after_the_check(root, bring, tmp_path, monkeypatch, swapped):
    """A part of the path becomes a link out of the root when it has just been resolved."""
    realpath = os.path.realpath

    def swap(path):
        resolved = realpath(path)
        if path == f"{root}/team/sql":
            (root / swapped).rename(tmp_path / "moved")
            (root / swapped).symlink_to(
                tmp_path / "secret" / swapped.removeprefix("team").strip("/")
            )
        return resolved

    monkeypatch.setattr(module.os.path, "realpath", swap)
    with pytest.raises((SourceNotFound, SourceForbidden)):
        bring(root / "team" / "sql")
    assert os.listdir(tmp_path / "into") == []


def test_a_folder_swapped_while_it_is_open(root, tmp_path):
    allowed, address = Allowed([f"file://{root}"]), Address.parse(f"file://{root}/team/sql")
    with allowed.opened(address) as folder:
        (root / "team").rename(tmp_path / "moved")
        (root / "team").symlink_to(tmp_path / "secret")
        assert os.path.samefile(folder, tmp_path / "moved" / "sql")


def test_what_fails_half_way_leaves_nothing(root, bring, tmp_path):
    with pytest.raises(TooLarge):
        bring(root / "team" / "sql", max_bytes=300)
    assert os.listdir(tmp_path / "into") == []
