from __future__ import annotations

import base64
import os
import socket
import threading
import time

import boto3
import pytest
from moto.server import ThreadedMotoServer

from adapters.errors import (
    AdapterError,
    ImportStopped,
    ImportTimeout,
    InvalidAdapter,
    SourceFailed,
    SourceForbidden,
    SourceNotFound,
    TooLarge,
)
from adapters.sources import fetch as fetch_allowed
from adapters.sources import objects, remote
from adapters.sources.address import Address, Allowed
from adapters.sources.intake import Transfer
from adapters.sources.objects import fetch
from tests.adapters.object_server import Line, Objects

CONFIG = b'{"r": 8}'
WEIGHTS = os.urandom(300_000)
BOTH = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
TOTAL = len(CONFIG) + len(WEIGHTS)
SCHEMES = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
KEY = base64.b64encode(b"SECRET").decode()
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "SECRETID",
    "AWS_SECRET_ACCESS_KEY": "SECRET",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
    "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
    "GOOGLE_SKIP_SIGNATURE": "true",
    "GOOGLE_ALLOW_HTTP": "true",
    "AZURE_STORAGE_ACCOUNT_NAME": "account",
    "AZURE_STORAGE_ACCOUNT_KEY": KEY,
    "AZURE_ALLOW_HTTP": "true",
}


@pytest.fixture(autouse=True)
def quick_and_local(monkeypatch):
    """Short pauses, no settings of this machine, and every store on loopback."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    nowhere = dict.fromkeys(SCHEMES.values(), "http://127.0.0.1:9")
    for name, value in {**SETTINGS, **nowhere}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    monkeypatch.setattr(objects, "TIMEOUT_S", 5)


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture
def store(scheme, monkeypatch):
    """A store that `scheme`'s addresses mean, with an adapter, its neighbours and more below."""
    content = {f"team/sql/{name}": data for name, data in BOTH.items()}
    stand_in = Objects({**content, "team/sql-2/x": b"x", "team/sql/deep/adapter_model.bin": b"x"})
    with stand_in.serve() as url:
        monkeypatch.setenv(SCHEMES[scheme], url)
        yield stand_in


@pytest.fixture
def refused(into):
    """Runs a fetch that fails and leaves nothing; the error."""

    def run(kind: type[AdapterError], text: str, transfer=None) -> AdapterError:
        with pytest.raises(kind) as raised:
            fetch(Address.parse(text), into, transfer or Transfer(10**6))
        assert type(raised.value) is kind
        assert os.listdir(into) == []
        assert "\n" not in raised.value.message
        assert "SECRET" not in raised.value.message
        return raised.value

    return run


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


# Any store ----------------------------------------------------------------------------------


def test_the_two_files_of_a_folder(store, scheme, into):
    transfer = Transfer(10**6)
    text = f"{scheme}://bucket/team/sql"
    assert fetch(Address.parse(text), into, transfer) == text
    assert contents(into) == BOTH
    assert (transfer.total, transfer.done) == (TOTAL, TOTAL)
    assert len(store.seen) == 3


def test_only_what_is_allowed(store, scheme, into):
    address = Address.parse(f"{scheme}://bucket/team/sql")
    with pytest.raises(SourceForbidden):
        fetch_allowed(address, into, Transfer(10**6), Allowed([f"{scheme}://bucket/team/sq"]))
    assert store.seen == []
    fetch_allowed(address, into, Transfer(10**6), Allowed([f"{scheme}://bucket/team"]))
    assert contents(into) == BOTH


@pytest.mark.parametrize("folder", ["", "/a b/ü+&*~:@=,;!'()$", '/…/[x]{y}|^`"<z>'])
def test_any_printable_folder(store, scheme, into, folder):
    prefix = f"{folder}/"[1:]
    store.objects = {prefix + name: data for name, data in BOTH.items()}
    fetch(Address.parse(f"{scheme}://bucket{folder}"), into, Transfer(10**6))
    assert contents(into) == BOTH


def test_a_broken_connection_is_gone_on_with(store, scheme, into):
    store.drops = [100_000, 100_000, 0]
    transfer = Transfer(10**6)
    fetch(Address.parse(f"{scheme}://bucket/team/sql"), into, transfer)
    assert contents(into) == BOTH
    assert transfer.done == TOTAL
    ranges = [(h.get("range"), h.get("if-match")) for p, h in store.seen if "model" in p]
    assert ranges[0] == (None, None)
    assert ranges[1:] == [("bytes=100000-", '"1"')] + [("bytes=200000-", '"1"')] * 2


@pytest.mark.parametrize("knows_if_match", [True, False])
def test_an_object_that_changes_meanwhile(store, scheme, refused, knows_if_match):
    store.drops, store.changes, store.knows_if_match = [100_000], True, knows_if_match
    error = refused(SourceFailed, f"{scheme}://bucket/team/sql")
    assert "changed while" in error.message


def test_it_is_given_up_after_five_attempts_without_a_byte(store, scheme, refused):
    store.drops = [100_000] + [0] * 20
    assert "5 attempts" in refused(SourceFailed, f"{scheme}://bucket/team/sql").message
    assert len(store.seen) == 2 + 5


@pytest.mark.parametrize(
    ("status", "kind", "attempts"),
    [
        (400, SourceFailed, 1),
        (401, SourceForbidden, 1),
        (403, SourceForbidden, 1),
        (404, SourceNotFound, 1),
        (429, SourceFailed, 5),
        (500, SourceFailed, 5),
        (503, SourceFailed, 5),
    ],
)
def test_refusals(store, scheme, refused, status, kind, attempts):
    store.status = status
    error = refused(kind, f"{scheme}://bucket/team/sql")
    assert len(store.seen) == attempts
    assert kind is not SourceFailed or str(status) in error.message


def test_what_a_folder_lacks(store, scheme, refused):
    refused(SourceNotFound, f"{scheme}://bucket/team/nothing")
    refused(SourceNotFound, f"{scheme}://bucket/team")
    error = refused(InvalidAdapter, f"{scheme}://bucket/team/sql/deep")
    assert [p.code for p in error.problems] == ["config_missing", "pickle_refused"]


def test_pickles(store, scheme, into):
    only = {"adapter_config.json": CONFIG, "adapter_model.bin": b"pickle"}
    store.objects = only
    fetch(Address.parse(f"{scheme}://bucket"), into, Transfer(10**6), allow_pickle=True)
    assert contents(into) == only


def test_what_is_too_large_is_not_begun(store, scheme, refused):
    refused(TooLarge, f"{scheme}://bucket/team/sql", Transfer(TOTAL - 1))
    assert len(store.seen) == 1


def test_stop_and_timeout(store, scheme, refused):
    store.pause_s = 0.05
    transfer = Transfer(10**6)
    threading.Timer(0.2, transfer.stop).start()
    began = time.monotonic()
    refused(ImportStopped, f"{scheme}://bucket/team/sql", transfer)
    refused(ImportTimeout, f"{scheme}://bucket/team/sql", Transfer(10**6, timeout_s=0.2))
    assert time.monotonic() - began < 5


def test_a_silent_store(scheme, refused, monkeypatch):
    monkeypatch.setattr(objects, "TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(SCHEMES[scheme], f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        refused(ImportTimeout, f"{scheme}://bucket/x", Transfer(10**6, timeout_s=0.2))
        assert time.monotonic() - began < 5


def test_no_store(scheme, refused):
    assert "lost or not had" in refused(SourceFailed, f"{scheme}://bucket/x").message


@pytest.mark.parametrize(("scheme", "name"), [("s3", "AWS"), ("az", "AZURE")])
def test_an_endpoint_without_tls_must_be_meant(scheme, name, refused, monkeypatch):
    monkeypatch.delenv(f"{name}_ALLOW_HTTP")
    assert f"{name}_ALLOW_HTTP" in refused(SourceFailed, f"{scheme}://bucket/x").message


def test_no_credentials(refused, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS_…" in refused(SourceForbidden, "s3://bucket/x").message


def test_nonsense_in_the_environment(scheme, refused, monkeypatch):
    monkeypatch.setenv(SCHEMES[scheme], "::::SECRET")
    refused(SourceFailed, f"{scheme}://bucket/x")


def test_redirects_do_not_take_credentials_along(store, scheme, refused):
    other = Objects({})
    with other.serve() as url:
        store.location = f"{url}/elsewhere/x"
        refused(SourceNotFound, f"{scheme}://bucket/team/sql")
    # The library follows them, and cannot be told not to.
    assert other.seen
    assert all("authorization" not in headers for _, headers in other.seen)


# S3, as moto speaks it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def line(moto, monkeypatch):
    """A line to a real S3 server with an adapter in a bucket."""
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{moto}")
    client.create_bucket(Bucket="bucket")
    for name, data in BOTH.items():
        client.put_object(Bucket="bucket", Key=f"team/sql/{name}", Body=data)
    client.put_object(Bucket="bucket", Key="team/sql/", Body=b"")
    line = Line(moto)
    with line.serve() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield line


def test_from_s3_over_a_line_that_breaks(line, into):
    line.cuts = [150_000, 400, 100_000]
    transfer = Transfer(10**6)
    fetch(Address.parse("s3://bucket/team/sql"), into, transfer)
    assert contents(into) == BOTH
    assert transfer.done == TOTAL
    assert line.connections == 4


def test_no_such_bucket_or_folder_on_s3(line, refused):
    refused(SourceNotFound, "s3://bucket-2/team/sql")
    refused(SourceNotFound, "s3://bucket/team/sq")
